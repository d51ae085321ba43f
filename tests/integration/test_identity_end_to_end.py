"""What makes a finished node run again and what does not, seen from the command line and from Python."""

import json

import pytest

from heliostat import (
    DistillConfig,
    ExportConfig,
    Pipeline,
    PruneConfig,
    QuantizeConfig,
    Resources,
    SelectConfig,
    Stage,
    Task,
    Tracking,
    TrainConfig,
    TuneConfig,
    load_pipeline,
    plan,
    run,
)


def to_run(copy, *settings):
    """Every node that would run, with the reason."""
    planned = plan(load_pipeline(copy.file, settings=settings))
    return {node.name: node.reason for node in planned.nodes if node.status == "run"}


def test_plan_json_says_what_is_reused(copy, heliostat):
    done = heliostat("plan", copy.file, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert {(node["status"], node["reason"].partition(" ")[0]) for node in document["nodes"]} == {("reuse", "done")}
    assert document["estimate"]["nodes_to_run"] == 0


def test_a_changed_value_reruns_that_node_and_those_after_it_and_says_why(copy, heliostat):
    copy.change("prune", matrix={"sparsity": [0.25, 0.6]})
    document = json.loads(heliostat("plan", copy.file, "--json").stdout)
    reasons = {node["name"]: node["reason"] for node in document["nodes"] if node["status"] == "run"}
    assert reasons.keys() == {"prune[sparsity=0.6]", "int8[prune[sparsity=0.6]]", "best"}
    copy.change("sparse", config={"method": "magnitude", "sparsity": 0.75, "finetune_epochs": 1})
    assert to_run(copy)["sparse"] == "config.sparsity 0.5 -> 0.75"


def test_a_changed_value_reaches_everything_that_needs_it(copy, finished):
    reasons = to_run(copy, "stages.train.config.epochs=4")
    assert reasons["train"] == "config.epochs 3 -> 4"
    assert reasons["student"] == "teacher: train changed"
    assert reasons["prune[sparsity=0.5]"] == "model: train changed"
    assert reasons["int8[student]"] == "model: student changed"
    assert reasons.keys() == finished.nodes.keys() - {"search"}


@pytest.mark.parametrize(
    "setting", ["seed=1", "task.data_version=v2", "task.metrics=[{reference: 'toy:accuracy', mode: min}]"]
)
def test_what_all_nodes_depend_on_reruns_them_all(copy, finished, setting):
    reasons = to_run(copy, setting)
    assert reasons.keys() == finished.nodes.keys()
    assert reasons["search"].split(" ")[0] == setting.split("=")[0]


def test_editing_the_users_module_reruns_what_used_it(copy, finished):
    copy.module.write_text(copy.module.read_text() + "\n# a thought\n")
    reasons = to_run(copy)
    assert reasons.keys() == finished.nodes.keys()
    assert reasons["search"] == "toy.py changed"
    assert reasons["train"] == "toy.py changed; params: search changed"


def test_editing_another_module_reruns_nothing(copy):
    (copy.folder / "other.py").write_text("raise SystemExit('never imported')\n")
    assert to_run(copy) == {}


def test_a_module_that_the_users_module_imports_is_part_of_it(copy):
    copy.module.write_text("import helper\n" + copy.module.read_text())
    (copy.folder / "helper.py").write_text("")
    assert to_run(copy)["search"] == "helper.py is new; toy.py changed"


@pytest.mark.parametrize(
    "settings",
    [
        ["tracking.uri=http://127.0.0.1:1", "tracking.experiment=another"],
        ["stages.train.resources={workers: 2, cpus_per_worker: 0.5}", "stages.train.retries=3"],
        ["stages.search.resources={max_concurrent_trials: 1}"],
    ],
)
def test_where_and_how_it_runs_reruns_nothing(copy, settings):
    assert to_run(copy, *settings) == {}


def test_a_store_may_move(copy, finished):
    copy.store.rename(copy.folder / "moved")
    assert to_run(copy).keys() == finished.nodes.keys()
    assert to_run(copy, "storage=moved") == {}


def test_force_runs_a_stage_and_what_needs_it(copy):
    planned = plan(load_pipeline(copy.file), force=["student"])
    again = {node.name for node in planned.nodes if node.status == "run"}
    assert again == {"student", "onnx", "int8[student]", "best"}


def test_the_python_form_reuses_what_the_file_made(copy, monkeypatch):
    monkeypatch.syspath_prepend(str(copy.folder))
    import toy

    space = {"optimizer.lr": {"loguniform": [0.001, 0.1]}, "model_args.width": {"choice": [8, 16]}}
    tune = TuneConfig(algorithm="bayesian", trials=4, space=space, train=TrainConfig(epochs=2), scheduler="asha")
    magnitude = PruneConfig(method="magnitude", sparsity=0.5, finetune_epochs=1)
    candidates = ("train", "prune", "student", "int8")
    pipeline = Pipeline(
        name="toy",
        root=copy.folder,
        task=Task(model=toy.build_model, data=toy.build_data, metrics=[toy.accuracy]),
        stages=(
            Stage("search", tune),
            Stage("train", TrainConfig(epochs=3), inputs={"params": "search"}, resources=Resources(workers=2)),
            Stage("prune", PruneConfig(finetune_epochs=1), inputs={"model": "train"}, matrix={"sparsity": (0.25, 0.5)}),
            Stage("student", DistillConfig(model_args={"width": 4}, epochs=2), inputs={"teacher": "train"}),
            Stage("int8", QuantizeConfig(), inputs={"model": ("train", "prune", "student")}),
            Stage("sparse", magnitude, inputs={"model": "train"}),
            Stage("onnx", ExportConfig(), inputs={"model": "student"}),
            Stage(
                "best",
                SelectConfig(max_drop={"val_accuracy": 0.1}),
                inputs={"baseline": "train", "candidates": candidates},
            ),
        ),
        tracking=Tracking(experiment="from Python"),
    )
    from_file = {node.name: node.fingerprint for node in plan(load_pipeline(copy.file)).nodes}
    assert {node.name: node.fingerprint for node in plan(pipeline).nodes} == from_file
    result = run(pipeline)
    assert (result.status, {node.status for node in result.nodes}) == ("done", {"reused"})
