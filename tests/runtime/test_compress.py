"""A search over chains of passes through real Ray: within limits, cut off and gone on with, and when chains fail."""

import json
import textwrap
import threading
from types import SimpleNamespace

import pytest

from heliostat.compression.formats import load_model
from heliostat.core.artifact import Artifact, Record
from heliostat.core.imports import use_root
from heliostat.core.spec import Resources, Task
from heliostat.core.stage import StageContext, Unheard
from heliostat.errors import StageError
from heliostat.stages.compress import CompressConfig, compress
from heliostat.stages.measure import measure_quality
from heliostat.stages.models import fine_tune, save_trained
from heliostat.stages.rerun import ended_trial, rerun
from heliostat.training.config import TrainConfig
from heliostat.training.task import build_model

TASK = """
    import os, signal
    import torch
    from torch import nn
    from torch.utils.data import TensorDataset

    def build_model(width=64):
        return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))

    def build_data():
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(800, 8, generator=generator)
        targets = (inputs @ torch.randn(8, 3, generator=generator)).argmax(1)
        parts = {"train": slice(0, 400), "val": slice(400, 600), "test": slice(600, 800)}
        return {split: TensorDataset(inputs[rows], targets[rows]) for split, rows in parts.items()}

    def accuracy(outputs, targets):
        return (outputs.argmax(1) == targets).float().mean().item()

    class Deadly(torch.optim.SGD):
        def __init__(self, params, lr=0.01):
            os.kill(os.getpid(), signal.SIGKILL)
"""
SPARSITIES = {"prune": {"sparsity": {"choice": [0.5, 0.75]}, "finetune_epochs": 2}}
METHODS = {"quantize": {"method": {"choice": ["static", "dynamic"]}}}
LIMITS = {"max_drop": {"val_accuracy": 0.1}, "max_size_mb": 0.01}


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    """The task and a model of it, recorded and measured as the stage `train` leaves it."""
    (root / "planes.py").write_text(textwrap.dedent(TASK))
    use_root(root)
    task = Task(model="planes:build_model", data="planes:build_data", metrics=["planes:accuracy"])
    config = TrainConfig(epochs=5, optimizer={"lr": 0.01})
    folder = tmp_path_factory.mktemp("train")
    context = context_in(folder, task, root)
    model = build_model(task, {})
    fine_tune(context, model, config)
    save_trained(context, model.eval(), config=config)
    params = {"train": config.model_dump(mode="json", exclude_unset=True)}
    fields = dict.fromkeys(["pipeline", "node", "stage", "uses", "fingerprint"], "train")
    metrics = measure_quality(folder, task, params)
    return SimpleNamespace(
        task=task,
        artifact=Artifact(folder, Record(kind="model", identity={}, params=params, metrics=metrics, **fields)),
    )


def context_in(folder, task, root, *, reporter=None, **inputs):
    folder.mkdir(exist_ok=True)
    return StageContext(
        node=folder.name,
        folder=folder,
        root=root,
        task=task,
        seed=0,
        resources=Resources(),
        inputs=inputs,
        reporter=reporter or Unheard(),
        cancel=threading.Event(),
    )


@pytest.fixture
def run(trained, root, tmp_path, reporter):
    """Compress the model by a config, in the same folder every time; where the outcome lies, and what it is."""

    def run(*, watch=lambda context: None, **config):
        context = context_in(run.folder, trained.task, root, reporter=reporter, model=(trained.artifact,))
        run.shelf = context.shelf
        watch(context)
        result = compress(context, CompressConfig.model_validate(config))
        rows = {row["model"]: row for row in result.details["table"]}
        return SimpleNamespace(context=context, folder=context.folder, result=result, details=result.details, rows=rows)

    run.folder = tmp_path / "small"
    return run


@pytest.fixture
def stop_after_three(reporter, monkeypatch):
    """Stops the run once three trials have ended."""

    def watch(context):
        ended = reporter.trial_ended

        def counting(trial, status, **more):
            ended(trial, status, **more)
            if len(reporter.ended) == 3:
                context.cancel.set()

        monkeypatch.setattr(reporter, "trial_ended", counting)

    return watch


@pytest.mark.usefixtures("ray_session")
def test_the_chain_that_is_found_keeps_to_the_limits_and_beats_plain_quantization(run, trained, reporter):
    found = run(**LIMITS, passes=[SPARSITIES, METHODS], trials=9)
    base, chosen = found.rows["train"]["metrics"], found.rows[found.details["chosen"]]
    assert chosen["metrics"]["size_mb"] <= 0.01
    assert chosen["metrics"]["val_accuracy"] >= base["val_accuracy"] - 0.1
    chains = {row["chain"].partition(" ")[2]: row for row in found.details["chains"]}
    assert len(chains) == 9
    assert chains["quantize(method=static)"]["size_mb"] > chosen["metrics"]["size_mb"]
    assert "size_mb" in chains["uncompressed"]["why"]
    assert all(row["why"] for row in chains.values())

    # what begins alike was made once: 12 passes in 8 chains, of which 8 differ
    assert found.details["passes"] == {"in_all_chains": 12, "made": 8}
    assert len(list(run.shelf.glob("*/made.json"))) == 8

    # the artifact is the best, and each of the front can be loaded
    front = {name: row for name, row in found.rows.items() if name != "train"}
    assert set(front) == {row["model"] for row in found.details["table"]} - {"train"}
    for row in front.values():
        assert load_model(found.folder / row["folder"]).format in ("torch", "onnx")
        assert {"test_accuracy", "val_accuracy_low", "latency_ms_b32"} <= row["metrics"].keys()
    model_file = f"{chosen['folder']}/model.onnx"
    assert (found.folder / "model.onnx").read_bytes() == (found.folder / model_file).read_bytes()
    assert {"model.onnx", "model.json", model_file} <= set(found.result.files)
    assert found.details["steps"][-1]["uses"] == "quantize"

    # every chain is a trial, and told of as one
    assert {status for status, _ in reporter.ended.values()} == {"done"}
    assert len(reporter.started) == 9

    # and can be made again, from the first pass on
    config = CompressConfig.model_validate({**LIMITS, "passes": [SPARSITIES, METHODS], "trials": 9})
    trial = found.details["chosen"].partition(" ")[0]
    before = {path: path.stat().st_mtime_ns for path in run.folder.parent.rglob("*")}
    again = rerun(found.context, config, ended_trial(found.context, config, trial))
    assert again.identical, again.differences
    assert {metric for metric, *_ in again.differences} >= {"val_accuracy", "size_mb"}
    assert {path: path.stat().st_mtime_ns for path in run.folder.parent.rglob("*")} == before


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_search_that_was_cut_off_makes_only_what_is_missing(run, reporter, stop_after_three):
    with pytest.raises(KeyboardInterrupt):
        run(**LIMITS, passes=[SPARSITIES, METHODS], trials=9, watch=stop_after_three)
    before = {path: path.stat().st_mtime_ns for path in run.shelf.glob("*/made.json")}
    ended = set(reporter.ended)
    assert before
    found = run(**LIMITS, passes=[SPARSITIES, METHODS], trials=9)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    events = [json.loads(line) for line in (run.folder / "journal.jsonl").read_text().splitlines()]
    restarted = {event["id"] for event in events if event["event"] == "restarted"}
    assert not restarted & ended
    assert found.details["passes"] == {"in_all_chains": 12, "made": 8}

    # nor does one with other limits, which is another node
    made = {path: path.stat().st_mtime_ns for path in run.shelf.glob("*/made.json")}
    run.folder = run.folder.with_name("smaller")
    run(**{**LIMITS, "max_size_mb": 0.05}, passes=[SPARSITIES], trials=3)
    assert {path: path.stat().st_mtime_ns for path in run.shelf.glob("*/made.json")} == made


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_chains_that_fail_are_told_with_their_reason_and_the_others_go_on(run):
    optimizers = {"choice": ["adam", "planes:Deadly"]}
    passes = [
        {"prune": {"sparsity": 0.5, "finetune_epochs": 1, "optimizer.name": optimizers}},
        {"quantize": {"skip": {"choice": [[], ["conv*"]]}}},
    ]
    found = run(max_drop={"val_accuracy": 0.5}, passes=passes, trials=9)
    why = {row["chain"].partition(" ")[2]: row["why"] for row in found.details["chains"]}
    assert "killed or crashed" in why["prune(optimizer.name=planes:Deadly)"]
    assert "'conv*' matches no layer" in why["prune(optimizer.name=adam) -> quantize(skip=['conv*'])"]
    assert found.details["trials"] == {"done": 4, "failed": 5}
    assert found.details["chosen"].endswith("prune(optimizer.name=adam) -> quantize(skip=[])")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_when_its_time_is_spent_the_best_so_far_is_chosen(run, stop_after_three):
    endless = {"factorize": {"energy": {"uniform": [0.5, 0.9]}}}
    settings = {"max_drop": {"val_accuracy": 1.0}, "passes": [endless], "trials": 5000}
    with pytest.raises(KeyboardInterrupt):
        run(**settings, watch=stop_after_three)
    found = run(**settings, wall_time_s=0.01)
    assert found.details["ended_by"] == "wall time"
    assert found.details["trials"]["done"] >= 3
    assert "factorize" in found.details["chosen"]


@pytest.mark.usefixtures("ray_session")
def test_when_no_chain_is_within_the_limits_the_closest_is_named(run):
    with pytest.raises(
        StageError, match=r"none of 3 trials is within the limits: .*size_mb at most 0.0001; the closest"
    ):
        run(max_drop={"val_accuracy": 1.0}, max_size_mb=0.0001, passes=[METHODS], trials=3)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_the_uncompressed_model_is_no_answer(run):
    with pytest.raises(StageError, match=r"none of 1 models is within the limits; the closest is 0002 prune: dropped"):
        run(max_drop={"val_accuracy": 0.0}, passes=[{"prune": {"sparsity": 0.9}}], trials=2)
