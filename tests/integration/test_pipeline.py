"""The toy pipeline end to end: what a finished run printed, wrote, tracked and can do again."""

import json
import pickle
import re
import sqlite3
from functools import partial
from pathlib import Path

import pytest
import torch

import heliostat as public
from heliostat.compression import formats as internal
from heliostat.core.artifact import Artifact, Record, read_record
from heliostat.core.spec import Resources, Task
from heliostat.core.stage import StageContext
from heliostat.errors import ArtifactError
from heliostat.stages.select import SelectConfig, select

MODELS = {"train", "prune[sparsity=0.25]", "prune[sparsity=0.5]", "student", "sparse", "onnx", "best"} | {
    f"int8[{source}]" for source in ("train", "prune[sparsity=0.25]", "prune[sparsity=0.5]", "student")
}
MEASURED = {
    *("val_loss", "val_accuracy", "test_loss", "test_accuracy", "size_mb", "num_params"),
    *("val_accuracy_low", "val_accuracy_high", "test_accuracy_low", "test_accuracy_high"),
    *("size_zip_mb", "num_nonzero", "num_macs", "peak_memory_mb", "latency_ms_p99", "latency_ms_all_threads"),
    *("latency_ms", "latency_ms_p95", "latency_ms_b32", "latency_ms_b32_p95"),
}


# --- what it printed ---------------------------------------------------------------------------------


def test_the_run_ends_well(finished):
    assert finished.process.returncode == 0, finished.process.stderr
    assert "Traceback" not in finished.process.stderr


def test_json_is_one_document_of_the_documented_shape(finished):
    document = finished.document
    assert {"pipeline", "status", "nodes", "tracking", "selected"} == document.keys() - {"log"}
    assert (document["pipeline"], document["status"]) == ("toy", "done")
    assert document["tracking"].keys() == {"uri", "experiment", "run_id"}
    assert document["tracking"]["uri"] == f"sqlite:///{finished.store / 'mlflow.db'}"
    assert document["selected"].keys() == {"node", "path", "metrics"}
    assert document["selected"]["node"] in MODELS
    assert document["selected"]["path"] == finished.nodes["best"]["path"]
    assert finished.nodes.keys() == {"search", *MODELS}
    for node in document["nodes"]:
        keys = {"name", "stage", "uses", "status", "fingerprint", "path", "seconds", "metrics"}
        assert node.keys() == keys
        assert node["status"] == "ran"
        assert node["seconds"] > 0
        assert Path(node["path"]) == finished.store / "toy" / node["stage"] / node["fingerprint"]


# --- what it wrote -----------------------------------------------------------------------------------


def test_every_model_is_measured(finished):
    for node in MODELS:
        metrics = finished.record(node)["metrics"]
        assert metrics.keys() >= MEASURED, node
        assert any(name.startswith("throughput") or "per_s" in name for name in metrics), metrics.keys()
        assert 0 < metrics["latency_ms"] <= metrics["latency_ms_p95"]
        assert metrics == finished.nodes[node]["metrics"]


def test_every_model_was_compared_with_its_source_after_it_was_loaded_again(finished):
    for node in MODELS - {"best"}:
        parity = finished.record(node)["details"]["parity"]
        reload = parity.get("reload")
        if reload is not None:
            assert reload["max_abs_diff"] == 0, node
        if node != "train":
            upstream = next(iter(finished.record(node)["inputs"].values()))[0]["node"]
            assert parity["source"]["against"] == upstream
            assert parity["source"]["max_abs_diff"] >= 0
    assert finished.record("onnx")["details"]["parity"]["source"]["max_abs_diff"] < 1e-4


def test_records_name_inputs_files_versions_and_the_commit(finished):
    record = finished.record("int8[train]")
    assert record["inputs"] == {"model": [{"node": "train", "fingerprint": finished.nodes["train"]["fingerprint"]}]}
    assert record["files"].keys() == {"model.json", "model.onnx"}
    assert {p.name for p in finished.path("int8[train]").iterdir()} == {"record.json", *record["files"]}
    assert record["versions"].keys() >= {"python", "torch", "ray", "mlflow", "onnxruntime"}
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", record["git_commit"])


def test_structured_pruning_makes_the_network_smaller(finished):
    nodes = ("train", "prune[sparsity=0.25]", "prune[sparsity=0.5]")
    trained, light, hard = (finished.record(node)["metrics"]["num_params"] for node in nodes)
    assert hard < light < trained


def test_magnitude_zeros_survive_fine_tuning(finished):
    state = torch.load(finished.path("sparse") / "weights.pt", weights_only=True)
    weights = torch.cat([tensor.flatten() for name, tensor in state.items() if name.endswith("weight")])
    assert (weights == 0).float().mean().item() == pytest.approx(0.5, abs=0.01)
    assert len(finished.record("sparse")["details"]["history"]) == 1


def test_the_best_parameters_override_the_config_of_the_training(finished):
    best = finished.record("search")["params"]
    trained = finished.record("train")["params"]["train"]
    assert trained["optimizer"]["lr"] == best["optimizer.lr"]
    assert trained["model_args"]["width"] == best["model_args.width"]
    assert trained["epochs"] == 3


# --- the choice --------------------------------------------------------------------------------------


def test_no_test_figure_can_change_the_choice(finished, tmp_path):
    context = {"node": "best", "root": tmp_path, "seed": 0, "resources": Resources(), "reporter": None}
    context["task"] = Task(model="toy:build_model", data="toy:build_data", metrics=["toy:accuracy"])

    def choose(name: str, test_figure) -> str:
        def artifact(node: str) -> Artifact:
            record = vars(read_record(finished.path(node)))
            tests = {key: test_figure(node) for key in record["metrics"] if key.startswith("test_")}
            return Artifact(finished.path(node), Record(**{**record, "metrics": {**record["metrics"], **tests}}))

        candidates = sorted(MODELS - {"best", "sparse", "onnx"})
        inputs = {"baseline": (artifact("train"),), "candidates": tuple(map(artifact, candidates))}
        (tmp_path / name).mkdir()
        result = select(StageContext(folder=tmp_path / name, inputs=inputs, **context), CHOICE)
        return result.details["chosen"]

    chosen = finished.document["selected"]["node"]
    assert choose("all", lambda node: 0.0) == chosen
    assert choose("worst", lambda node: 0.0 if node == chosen else 1.0) == chosen


CHOICE = SelectConfig(max_drop={"val_accuracy": 0.1})


# --- using the models --------------------------------------------------------------------------------

USE = """
import sys
import torch
import heliostat

class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name == "toy":
            raise AssertionError("the user's module is imported")

folder, data, forbid = sys.argv[1:]
if forbid == "forbid":
    sys.meta_path.insert(0, Forbidden())
inputs, targets = torch.load(data, weights_only=True)
outputs = heliostat.load_model(folder, trust_code=forbid == "trust")(inputs)
print((outputs.argmax(1) == targets).float().mean().item())
"""


@pytest.fixture
def held_out(finished, monkeypatch, tmp_path):
    """The toy's test split as a file of tensors."""
    monkeypatch.syspath_prepend(str(finished.folder))
    from toy import build_data

    file = tmp_path / "test.pt"
    torch.save(build_data()["test"].tensors, file)
    return file


@pytest.mark.parametrize(
    ("node", "forbid"), [("prune[sparsity=0.5]", "trust"), ("int8[train]", "forbid"), ("onnx", "forbid")]
)
def test_a_model_loads_in_a_fresh_process_without_the_users_folder(finished, copy, python, held_out, node, forbid):
    copy.module.unlink()
    folder = copy.folder / finished.path(node).relative_to(finished.folder)
    accuracy = float(python(USE, folder, held_out, forbid))
    assert accuracy == pytest.approx(finished.record(node)["metrics"]["test_accuracy"], abs=1e-6)


def test_a_changed_module_does_not_change_a_finished_model(finished, copy, python, held_out):
    copy.module.write_text("def build_model(width): raise SystemExit('not this one')\n")
    folder = copy.folder / finished.path("train").relative_to(finished.folder)
    accuracy = float(python(USE, folder, held_out, "trust"))
    assert accuracy == pytest.approx(finished.record("train")["metrics"]["test_accuracy"], abs=1e-6)


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_loading_never_unpickles_weights(finished, copy, tmp_path):
    folder = copy.folder / finished.path("train").relative_to(finished.folder)
    marker = tmp_path / "executed"
    torch.save({"0.weight": Malicious(marker)}, folder / "weights.pt")
    for load in (partial(public.load_model, trust_code=True), internal.load_model):
        with pytest.raises(ArtifactError, match=r"weights\.pt"):
            load(folder)
    (folder / "weights.pt").write_bytes(pickle.dumps(Malicious(marker)))
    with pytest.raises(ArtifactError, match=r"weights\.pt"):
        internal.load_model(folder)
    assert not marker.exists()


# --- MLflow ------------------------------------------------------------------------------------------


@pytest.fixture
def mlflow(finished):
    from heliostat.tracking import quiet

    quiet.silence()
    import mlflow

    mlflow.set_tracking_uri(finished.document["tracking"]["uri"])
    return mlflow


@pytest.fixture
def tree(finished, mlflow):
    """Every run by its name, and the client."""
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(finished.document["tracking"]["experiment"])
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    return {run.info.run_name: run for run in runs}, client


def test_a_search_tells_what_happened_at_each_rung(finished, heliostat):
    details = finished.record("search")["details"]
    trials = json.loads((finished.path("search") / "trials.json").read_text())
    stopped = [trial["verdicts"][-1]["epoch"] for trial in trials if trial["status"] == "stopped"]
    assert [(rung["epoch"], rung["reached"], rung["stopped"]) for rung in details["rungs"]] == [
        (1, 4, len(stopped)),
        (2, 4 - len(stopped), 0),
    ]
    shown = heliostat("show", "search", "--storage", finished.store).stdout
    assert re.search(r"epoch +reached +stopped +lowest_cut +highest_cut", shown)
    assert re.search(rf"^ +2 +{4 - len(stopped)} +0 *$", shown, re.MULTILINE)


def test_the_history_is_one_tree_of_pipeline_stages_and_trials(finished, tree):
    runs, _ = tree
    top = runs["toy"]
    assert top.info.run_id == finished.document["tracking"]["run_id"]
    parents = {name: run.data.tags.get("mlflow.parentRunId") for name, run in runs.items()}
    trials = {name for name in runs if re.fullmatch(r"\d{4}", name)}
    assert len(trials) == 4
    assert {name for name, parent in parents.items() if parent == top.info.run_id} == {"search", *MODELS}
    assert {name for name, parent in parents.items() if parent == runs["search"].info.run_id} == trials
    stopped = {
        trial["id"]
        for trial in json.loads((finished.path("search") / "trials.json").read_text())
        if trial["status"] == "stopped"
    }
    assert {name: run.info.status for name, run in runs.items()} == {
        name: "KILLED" if name in stopped else "FINISHED" for name in runs
    }
    assert all("val_accuracy" in runs[name].data.tags["heliostat.reason"] for name in stopped)
    for node in finished.nodes:
        assert finished.record(node)["tracking"]["pipeline_run_id"] == top.info.run_id
        assert runs[node].data.tags["heliostat.fingerprint"] == finished.nodes[node]["fingerprint"]
        assert finished.record(node)["tracking"]["run_id"] == runs[node].info.run_id
        took = runs[node].info.end_time - runs[node].info.start_time
        assert took == round(1000 * finished.record(node)["seconds"]) == round(1000 * finished.nodes[node]["seconds"])


def test_parameters_and_every_epoch_are_in_the_history(finished, tree):
    runs, client = tree
    assert runs["prune[sparsity=0.5]"].data.params["sparsity"] == "0.5"
    assert runs["train"].data.params["epochs"] == "3"
    found = finished.record("search")["params"]
    for node in ("train", "prune[sparsity=0.5]", "sparse"):
        used = runs[node].data.params
        assert {path: used[path] for path in found} == {path: str(value) for path, value in found.items()}
    assert runs["student"].data.params["model_args.width"] == "4"
    assert runs["search"].data.params.keys().isdisjoint(f"train.{path}" for path in found)
    best = runs[finished.record("search")["details"]["best_trial"]]
    assert float(best.data.params["optimizer.lr"]) == finished.record("search")["params"]["optimizer.lr"]

    def epochs(run, name, count):
        history = sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, name))
        return [(step, value) for step, value in history if 1 <= step <= count]

    assert [step for step, _ in epochs(best, "val_accuracy", 2)] == [1, 2]
    rows = finished.record("train")["details"]["history"]
    expected = [(epoch, pytest.approx(row["val_loss"])) for epoch, row in enumerate(rows, 1)]
    assert epochs(runs["train"], "val_loss", 99) == expected
    record = finished.record("train")
    for name in ("val_loss", "test_loss", "size_mb", "latency_ms"):
        (point,) = client.get_metric_history(runs["train"].info.run_id, f"best_{name}" if name == "val_loss" else name)
        assert (point.step, point.value) == (record["details"]["best_epoch"], pytest.approx(record["metrics"][name]))
    measured = {name: runs["int8[train]"].data.metrics[name] for name in MEASURED}
    assert measured == pytest.approx({name: finished.record("int8[train]")["metrics"][name] for name in MEASURED})


def test_the_pipeline_the_records_the_commit_and_the_versions_are_in_the_history(finished, tree, tmp_path):
    runs, client = tree
    top = runs["toy"]
    assert {file.path for file in client.list_artifacts(top.info.run_id)} >= {"pipeline.yaml", "code"}
    (tmp_path / "record").mkdir()
    kept = client.download_artifacts(runs["student"].info.run_id, "record.json", str(tmp_path / "record"))
    assert json.loads(Path(kept).read_text())["fingerprint"] == finished.nodes["student"]["fingerprint"]
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", top.data.tags["mlflow.source.git.commit"])
    assert top.data.tags["version.torch"] == torch.__version__


def test_the_chosen_model_loads_from_mlflow_and_predicts_the_same(finished, mlflow, tree, held_out):
    runs, _ = tree
    inputs, _ = torch.load(held_out, weights_only=True)
    loaded = mlflow.pyfunc.load_model(f"runs:/{runs['best'].info.run_id}/model")
    ours = public.load_model(finished.path("best"), trust_code=True)(inputs)
    torch.testing.assert_close(torch.as_tensor(loaded.predict(inputs.numpy())), ours, rtol=0, atol=1e-6)


def test_the_tracking_database_is_sound(finished):
    with sqlite3.connect(finished.store / "mlflow.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert not list((finished.store / "spool").glob("*.jsonl"))


# --- again -------------------------------------------------------------------------------------------

AGAIN = """
import sys
from heliostat.cli import main

sys.argv = ["heliostat", "run", sys.argv[1]]
try:
    main()
except SystemExit as end:
    assert end.code in (0, None), end.code
loaded = {"ray", "mlflow"} & sys.modules.keys()
assert not loaded, loaded
"""


def test_a_second_run_reuses_all_and_imports_neither_ray_nor_mlflow(finished, python):
    records = {node: (finished.path(node) / "record.json").stat().st_mtime_ns for node in finished.nodes}
    logs = sorted((finished.store / "logs").iterdir())
    shown = python(AGAIN, finished.file)
    assert f"chosen: {finished.document['selected']['node']}" in shown
    assert all(f"int8[{source}]" in shown for source in ("train", "student"))
    assert records == {node: (finished.path(node) / "record.json").stat().st_mtime_ns for node in finished.nodes}
    assert sorted((finished.store / "logs").iterdir()) == logs


def test_the_store_shows_its_runs_and_nodes(finished, heliostat):
    (run,) = json.loads(heliostat("runs", "--storage", finished.store, "--json").stdout)
    assert (run["status"], run["nodes"]) == ("done", finished.document["nodes"])
    listed = heliostat("runs", "--storage", finished.store)
    assert run["run"] in listed.stdout
    assert finished.document["selected"]["node"] in listed.stdout
    shown = heliostat("show", run["run"], "--storage", finished.store)
    assert (shown.returncode, "student" in shown.stdout) == (0, True)
    node = json.loads(heliostat("show", "student", "--storage", finished.store, "--json").stdout)
    assert node == {"path": str(finished.path("student")), **finished.record("student")}
    unknown = heliostat("show", "studnet", "--storage", finished.store)
    assert (unknown.returncode, "did you mean 'student'" in unknown.stderr) == (2, True)
