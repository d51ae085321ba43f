"""From a pipeline to a graph: which nodes there are, what goes into each, and why a node would run."""

import json
from datetime import UTC, datetime

import pytest

from heliostat.core.artifact import RECORD, Record, digest_files, write_record
from heliostat.core.capacity import Capacity
from heliostat.core.load import load_pipeline
from heliostat.core.plan import Node, Plan, artifact_of, check_fits
from heliostat.errors import ArtifactError, ResourceError
from heliostat.runner import plan

CLOCK = iter(range(10**6))


def finish(node: Node) -> None:
    """Leave in the store what a run of the node would have left."""
    node.folder.mkdir(parents=True, exist_ok=True)
    (node.folder / "model.bin").write_bytes(b"weights")
    write_record(
        node.folder,
        Record(
            kind=node.kind.output,
            pipeline=node.folder.parents[1].name,
            node=node.name,
            stage=node.stage,
            uses=node.uses,
            fingerprint=node.fingerprint,
            identity=json.loads(json.dumps(node.identity)),
            files=digest_files(node.folder, ["model.bin"]),
            started_at=datetime.fromtimestamp(next(CLOCK), UTC).isoformat(timespec="seconds"),
            seconds=2.5,
        ),
    )


@pytest.fixture
def planned(toy):
    """The plan of the toy pipeline, with settings and forced stages."""

    def plan_with(*settings: str, force: tuple[str, ...] = ()) -> Plan:
        return plan(load_pipeline(toy.file, settings=settings), force=force)

    return plan_with


@pytest.fixture
def done(planned):
    """The same, after everything has run once."""
    for node in planned().nodes:
        finish(node)
    return planned


def running(plan: Plan) -> dict[str, str]:
    return {node.name: node.reason for node in plan.nodes if node.status == "run"}


# --- expansion -------------------------------------------------------------------------------------


def test_a_matrix_and_a_list_of_inputs_make_one_node_each(planned):
    assert [node.name for node in planned().nodes] == [
        "search",
        "train",
        "prune[sparsity=0.25]",
        "prune[sparsity=0.5]",
        "student",
        "int8[train]",
        "int8[prune[sparsity=0.25]]",
        "int8[prune[sparsity=0.5]]",
        "int8[student]",
        "best",
    ]


def test_a_matrix_of_two_fields_and_two_inputs_is_the_product_of_all(planned):
    plan = planned(
        "stages.prune.inputs.model=[train]",
        "stages.int8.inputs.model=[train, student]",
        "stages.int8.matrix={method: [static, dynamic], per_channel: [true, false]}",
    )
    names = [node.name for node in plan.nodes if node.stage == "int8"]
    assert len(names) == 8
    assert names[0] == "int8[method=static,per_channel=True,train]"
    assert names[-1] == "int8[method=dynamic,per_channel=False,student]"


def test_formats_and_backends_are_a_matrix_each_and_a_choice_by_latency_gathers_all(planned):
    plan = planned(
        "stages.student.uses=export",
        "stages.student.inputs={model: train}",
        "stages.student.config={}",
        "stages.student.matrix={format: [onnx, pt2]}",
        "stages.int8.inputs.model=train",
        "stages.int8.matrix={backend: [onnxruntime, torchao]}",
        "stages.best.inputs.candidates=[train, student, int8]",
        "stages.best.config.minimize=[latency_ms]",
    )
    files = ["student[format=onnx]", "student[format=pt2]", "int8[backend=onnxruntime]", "int8[backend=torchao]"]
    assert [node.name for node in plan.node("best").inputs["candidates"]] == ["train", *files]
    assert len({plan.node(name).fingerprint for name in files}) == 4


def test_a_matrix_value_overrides_the_config_down_to_a_nested_field(planned):
    plan = planned("stages.train.config={optimizer: {name: sgd, lr: 0.5}}", "stages.train.matrix.optimizer.lr=[0.1]")
    (train,) = (node for node in plan.nodes if node.stage == "train")
    assert train.name == "train[optimizer.lr=0.1]"
    assert (train.config.optimizer.name, train.config.optimizer.lr) == ("sgd", 0.1)


def test_a_gathering_slot_takes_every_variant_and_a_single_one_takes_one(planned):
    plan = planned()
    best = plan.node("best")
    assert [node.name for node in best.inputs["candidates"]] == [
        n.name for n in plan.nodes if n.kind.output == "model"
    ][:-1]
    assert [node.name for node in best.inputs["baseline"]] == ["train"]
    assert [node.name for node in plan.node("int8[student]").inputs["model"]] == ["student"]


def test_every_node_comes_after_what_it_needs(planned):
    seen: set[str] = set()
    for node in planned().nodes:
        assert {up.name for up in node.upstream} <= seen
        seen.add(node.name)


def test_an_optional_input_may_be_left_out(planned):
    plan = planned("stages.train.inputs={}")
    assert plan.node("train").inputs == {}


def test_a_nodes_folder_says_what_it_is(toy, planned):
    node = planned("storage=store").node("prune[sparsity=0.5]")
    assert node.folder == toy.folder.resolve() / "store" / "toy" / "prune" / node.fingerprint


def test_the_plan_imports_the_users_functions_and_calls_none(toy, planned):
    toy.module.write_text(
        "def build_model(width=1): raise AssertionError\n"
        "def build_data(): raise AssertionError\n"
        "def accuracy(outputs, targets): raise AssertionError\n"
    )
    assert set(planned().functions) == {"model", "data", "loss", "metrics[0]"}


# --- reuse, and why not ----------------------------------------------------------------------------


def test_at_first_everything_runs(planned):
    assert set(running(planned()).values()) == {"first run"}
    assert all(node.estimate_s is None for node in planned().nodes)


def test_what_is_done_is_reused(done):
    assert running(done()) == {}
    assert all(node.reason.startswith("done 1970-01-01T") for node in done().nodes)


@pytest.mark.parametrize(
    "setting",
    [
        "stages.train.resources.workers=2",
        "stages.search.resources.max_concurrent_trials=1",
        "stages.prune.retries=5",
        "tracking.uri=http://localhost:5000",
    ],
)
def test_how_a_stage_runs_reruns_nothing(done, setting):
    assert running(done(setting)) == {}


def test_a_changed_value_reruns_that_node_and_those_after_it_and_says_why(done):
    assert running(done("stages.train.config.epochs=4")) == {
        "train": "config.epochs 3 -> 4",
        "prune[sparsity=0.25]": "model: train changed",
        "prune[sparsity=0.5]": "model: train changed",
        "student": "teacher: train changed",
        "int8[train]": "model: train changed",
        "int8[prune[sparsity=0.25]]": "model: prune[sparsity=0.25] changed",
        "int8[prune[sparsity=0.5]]": "model: prune[sparsity=0.5] changed",
        "int8[student]": "model: student changed",
        "best": "baseline: train changed; "
        + "; ".join(
            f"candidates: {name} changed"
            for name in sorted(
                [
                    "train",
                    "prune[sparsity=0.25]",
                    "prune[sparsity=0.5]",
                    "student",
                    "int8[train]",
                    "int8[prune[sparsity=0.25]]",
                    "int8[prune[sparsity=0.5]]",
                    "int8[student]",
                ]
            )
        ),
    }


def test_a_new_matrix_value_runs_alone_beside_what_is_kept(done):
    reasons = running(done("stages.prune.matrix.sparsity=[0.25, 0.5, 0.75]"))
    assert list(reasons) == ["prune[sparsity=0.75]", "int8[prune[sparsity=0.75]]", "best"]
    assert reasons["prune[sparsity=0.75]"] == "first run"
    assert "candidates: prune[sparsity=0.75] is new" in reasons["best"]


def test_an_edited_module_is_named(toy, done):
    toy.module.write_text(toy.module.read_text() + "# more\n")
    assert running(done())["search"] == "toy.py changed"


def test_a_new_seed_is_named(done):
    assert running(done("seed=1"))["search"] == "seed 0 -> 1"


def test_going_back_to_an_earlier_value_reuses_what_it_made(done):
    for node in done("stages.train.config.epochs=4").nodes:
        finish(node)
    assert running(done()) == {}


def test_a_node_that_was_interrupted_goes_on(planned):
    node = planned().node("train")
    (node.folder / "checkpoints").mkdir(parents=True)
    assert running(planned())["train"] == "goes on where it was interrupted"


def test_a_node_whose_files_are_cut_short_runs_again(done):
    (done().node("train").folder / "model.bin").write_bytes(b"")
    assert running(done()) == {"train": "files of the artifact are missing or cut short"}


def test_a_node_whose_record_is_damaged_stops_the_plan_and_says_what_to_do(done):
    (done().node("train").folder / RECORD).write_text("{")
    with pytest.raises(ArtifactError, match=r"record\.json is damaged .* delete that folder and run again"):
        done()


def test_forcing_a_stage_runs_its_nodes_and_all_that_need_them(done):
    assert running(done(force=("prune",))) == {
        "prune[sparsity=0.25]": "forced",
        "prune[sparsity=0.5]": "forced",
        "int8[prune[sparsity=0.25]]": "forced with prune[sparsity=0.25]",
        "int8[prune[sparsity=0.5]]": "forced with prune[sparsity=0.5]",
        "best": "forced with prune[sparsity=0.25], prune[sparsity=0.5], int8[prune[sparsity=0.25]], "
        "int8[prune[sparsity=0.5]]",
    }


def test_another_pipeline_in_the_same_store_shares_nothing(toy, done):
    document = toy.document
    document["name"] = "other"
    other = plan(load_pipeline(toy.write(document, "other.yaml")))
    assert set(running(other).values()) == {"first run"}


def test_what_a_stage_took_before_is_the_estimate_for_the_next_time(done):
    plan = done("stages.prune.config.finetune_epochs=2")
    assert plan.node("prune[sparsity=0.5]").estimate_s == 2.5
    assert plan.node("train").estimate_s == 0.0


def test_an_artifact_of_a_node_is_there_only_when_it_is_done(planned):
    node = planned().node("train")
    with pytest.raises(ArtifactError, match="train: no finished artifact"):
        artifact_of(node)
    finish(node)
    assert artifact_of(node).record.fingerprint == node.fingerprint


# --- whether it fits -------------------------------------------------------------------------------


def test_only_what_still_has_to_run_must_fit(toy, planned):
    many = "stages.train.resources={workers: 3, cpus_per_worker: 2, gpus_per_worker: 1}"
    with pytest.raises(ResourceError) as caught:
        check_fits(planned(many), Capacity(({"CPU": 4, "GPU": 3},)), where="the cluster")
    assert str(caught.value).startswith("train: needs 6 CPUs and 3 GPUs at once; the cluster has 4 CPUs and 3 GPUs.")
    check_fits(planned(many), Capacity(({"CPU": 6, "GPU": 3},)), where="the cluster")
    finish(planned().node("train"))
    check_fits(planned(many), Capacity(({"CPU": 1},)), where="the cluster")


def test_a_worker_must_fit_on_one_node(planned):
    many = planned("stages.search.resources={workers_per_trial: 2, cpus_per_worker: 2, gpus_per_worker: 0.5}")
    with pytest.raises(ResourceError, match=r"2 x 2 CPUs and 0.5 GPUs\); the cluster has 6 CPUs and 2 GPUs on 2 nodes"):
        check_fits(many, Capacity(({"CPU": 3}, {"CPU": 3, "GPU": 2})), where="the cluster")
    check_fits(many, Capacity(({"CPU": 3, "GPU": 1}, {"CPU": 3, "GPU": 1})), where="the cluster")
