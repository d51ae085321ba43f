"""The user's own training loop and own stages, and what happens to a run when the user's code fails."""

import json
from pathlib import Path

import pytest

MODULE = '''
import time

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from heliostat.core.model import Spec
from heliostat.core.stage import StageResult, stage
from toy import build_data, build_model


def train_fn(context, config):
    """Plain SGD; a width of 3 is refused and one of 5 diverges."""
    width = config.model_args["width"]
    if width == 3:
        raise ValueError("no net is 3 wide")
    model, data = build_model(**config.model_args), build_data(**config.data_args)
    model, loader = context.prepare(model, DataLoader(data["train"], batch_size=config.batch_size, shuffle=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=config.optimizer.lr)
    for _ in range(config.epochs):
        for inputs, targets in loader:
            optimizer.zero_grad()
            cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        inputs, targets = data["val"].tensors
        with torch.no_grad():
            outputs = model(inputs)
        figures = {
            "val_loss": float("nan") if width == 5 else cross_entropy(outputs, targets).item(),
            "val_accuracy": (outputs.argmax(1) == targets).float().mean().item(),
            "val_mine": float(context.world_size),
        }
        context.report(figures, checkpoint=model.state_dict())


class ScaleConfig(Spec):
    factor: float = 1.0
    together: int = 1


@stage("scale", inputs={"model": "model"}, output="model")
def scale(context, config: ScaleConfig) -> StageResult:
    """Multiplies the last layer, while as many as `together` of the nodes are at it: the decisions stay as they are."""
    from heliostat.stages.models import save_trained, torch_model, train_config_of

    source = context.one("model")
    model = torch_model(source)
    with torch.no_grad():
        model[-1].weight.mul_(config.factor)
        model[-1].bias.mul_(config.factor)
    (context.root / f"{config.factor}.started").touch()  # in its own folder it would go when the stage ends
    deadline = time.monotonic() + 120
    while len(list(context.root.glob("*.started"))) < config.together:
        assert time.monotonic() < deadline, "nobody else has started"
        time.sleep(0.1)
    files = save_trained(context, model, config=train_config_of(source))
    return StageResult(files=files, params=source.record.params, details={"factor": config.factor})


class CountConfig(Spec):
    unit: str = "layers"


@stage("count", inputs={"models": "model*"}, output="counted")
def count(context, config: CountConfig) -> StageResult:
    names = [artifact.node for artifact in context.inputs["models"]]
    (context.folder / "counted.txt").write_text("\\n".join(names))
    return StageResult(files=["counted.txt"], metrics={"models": len(names)}, params={"unit": config.unit})


@stage("fail", inputs={"model": "model?"}, output="model")
def fail(context, config: CountConfig) -> StageResult:
    raise RuntimeError(f"cannot count {config.unit}")
'''


@pytest.fixture(scope="module")
def outcome(tmp_path_factory, toy_in, heliostat_in):
    """A run with an own loop and own stages, in which some trials, a whole search and a stage are bad: its process."""
    toy = toy_in(tmp_path_factory.mktemp("own") / "toy")
    (toy.folder / "mine.py").write_text(MODULE)
    training = {"optimizer": {"name": "sgd", "lr": 0.1}}
    searching = {"algorithm": "grid", "objective": {"metric": "val_loss"}}
    some_bad = {"model_args.width": {"grid": [3, 5, 8, 16]}}
    all_bad = {"model_args.width": {"grid": [3, 5]}, "optimizer.weight_decay": {"grid": [0.0, 0.1]}}
    document = toy.document
    document["task"]["train_fn"] = "mine:train_fn"
    document["stages"] = [
        {
            "name": "search",
            "uses": "tune",
            "config": {**searching, "space": some_bad, "train": {"epochs": 2, **training}},
        },
        {"name": "train", "uses": "train", "inputs": {"params": "search"}, "config": {"epochs": 3, **training}},
        {
            "name": "scaled",
            "uses": "mine:scale",
            "inputs": {"model": "train"},
            "matrix": {"factor": [2.0, 3.0]},
            "config": {"together": 2},
            "resources": {"cpus_per_worker": 0.5},
        },
        {"name": "counted", "uses": "mine:count", "inputs": {"models": ["train", "scaled"]}},
        {
            "name": "best",
            "uses": "select",
            "inputs": {"baseline": "train", "candidates": ["train", "scaled"]},
            "config": {"max_drop": {"val_accuracy": 0.0}},
        },
        {"name": "doomed", "uses": "tune", "config": {**searching, "space": all_bad, "train": {"epochs": 1}}},
        {"name": "untrained", "uses": "train", "inputs": {"params": "doomed"}},
        {"name": "int8", "uses": "quantize", "inputs": {"model": "untrained"}},
        {"name": "bad", "uses": "mine:fail", "inputs": {"model": "train"}, "config": {"unit": "sheep"}},
    ]
    toy.write(document)
    return heliostat_in(toy.folder)("run", "toy.yaml", "--json", timeout=550)


@pytest.fixture(scope="module")
def nodes(outcome):
    assert outcome.returncode == 1, outcome.stderr
    return {node["name"]: node for node in json.loads(outcome.stdout)["nodes"]}


@pytest.fixture(scope="module")
def own(nodes):
    """The records of the nodes that were done, each with its folder."""
    done = {name: Path(node["path"]) for name, node in nodes.items() if node["status"] == "ran"}
    return {name: json.loads((path / "record.json").read_text()) | {"folder": path} for name, path in done.items()}


def test_a_trial_that_raises_or_is_not_a_number_is_a_state_and_the_search_goes_on(own):
    trials = {
        t["params"]["model_args.width"]: t for t in json.loads((own["search"]["folder"] / "trials.json").read_text())
    }
    assert {width: trial["status"] for width, trial in trials.items()} == {
        3: "failed",
        5: "failed",
        8: "done",
        16: "done",
    }
    assert trials[3]["reason"].startswith("ValueError: no net is 3 wide")
    assert "train_fn" in trials[3]["reason"]
    assert trials[5]["reason"] == "val_loss is not a number at epoch 1"
    assert own["search"]["details"]["trials"] == {"done": 2, "stopped": 0, "failed": 2}
    assert own["search"]["params"]["model_args.width"] in (8, 16)


def test_an_own_loop_trains_what_the_search_found_and_its_own_metrics_are_kept(own):
    train = own["train"]
    assert train["params"]["train"]["model_args"] == {"width": own["search"]["params"]["model_args.width"]}
    assert len(train["details"]["history"]) == 3
    assert train["metrics"]["val_mine"] == 1
    assert train["metrics"]["test_accuracy"] > 0.4


def test_an_own_stage_that_makes_models_is_measured_and_may_be_chosen_like_any_other(own):
    two, three = own["scaled[factor=2.0]"], own["scaled[factor=3.0]"]
    assert two["details"]["factor"] == 2
    for scaled in (two, three):
        assert scaled["metrics"]["val_accuracy"] == own["train"]["metrics"]["val_accuracy"]
        assert scaled["metrics"]["latency_ms"] > 0
        assert scaled["identity"]["sources"].keys() == {"mine.py", "toy.py"}
    assert len(own["best"]["details"]["table"]) == 3


def test_independent_nodes_run_side_by_side(own):
    # Each has waited for the other to start before it went on.
    assert {"scaled[factor=2.0]", "scaled[factor=3.0]"} < own.keys()


def test_an_own_kind_of_artifact_is_recorded(own):
    counted = own["counted"]
    assert (counted["kind"], counted["metrics"], counted["params"]) == ("counted", {"models": 3}, {"unit": "layers"})
    listed = (counted["folder"] / "counted.txt").read_text().split()
    assert listed == ["train", "scaled[factor=2.0]", "scaled[factor=3.0]"]


# --- failures ----------------------------------------------------------------------------------------


def test_a_failure_stops_what_depends_on_it_and_nothing_else(outcome, nodes):
    assert json.loads(outcome.stdout)["status"] == "failed"
    states = {name: node["status"] for name, node in nodes.items() if node["status"] != "ran"}
    assert states == {"doomed": "failed", "untrained": "skipped", "int8": "skipped", "bad": "failed"}
    assert nodes["int8"]["error"] == "needs untrained"
    assert json.loads(outcome.stdout)["selected"]["path"] == nodes["best"]["path"]


def test_when_all_trials_fail_the_commonest_reason_comes_first(nodes):
    first, reasons = nodes["doomed"]["error"].split("\n", 1)
    assert first == "all 4 trials failed"
    assert reasons.startswith("2 of 4: ")
    assert "ValueError: no net is 3 wide" in reasons
    assert "2 of 4: val_loss is not a number at epoch 1" in reasons


def test_a_failed_stage_shows_the_users_own_traceback(outcome, nodes):
    error = nodes["bad"]["error"]
    assert error.startswith("RuntimeError: cannot count sheep")
    assert 'mine.py", line' in error
    assert "runtime/tasks.py" not in error
    assert "bad: failed: RuntimeError: cannot count sheep" in outcome.stderr


def test_failures_are_in_the_history(outcome, nodes):
    from heliostat.tracking import quiet

    quiet.silence()
    import mlflow

    client = mlflow.MlflowClient(json.loads(outcome.stdout)["tracking"]["uri"])
    experiment = client.get_experiment_by_name("toy")
    runs = client.search_runs([experiment.experiment_id])
    stages = {run.info.run_name: run for run in runs if "heliostat.stage" in run.data.tags}
    failed = {"doomed", "bad"}
    assert {name for name, run in stages.items() if run.info.status == "FAILED"} == failed
    assert stages.keys() == {name for name, node in nodes.items() if node["status"] == "ran"} | failed
    assert stages["bad"].data.tags["heliostat.error"] == "RuntimeError: cannot count sheep"
    doomed = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == stages["doomed"].info.run_id]
    assert [run.info.status for run in doomed] == ["FAILED"] * 4
    assert {run.info.run_name: run.info.status for run in runs}["toy"] == "FAILED"
