"""Searches for several objectives, through real Ray."""

import json
import threading

import pytest

from heliostat.core.objective import Objectives
from heliostat.core.spec import Resources, Task
from heliostat.core.stage import StageContext
from heliostat.errors import StageError
from heliostat.runtime.scheduling import AshaSettings
from heliostat.stages.tune import TuneConfig, tune
from heliostat.training.config import TrainConfig

pytestmark = pytest.mark.usefixtures("ray_session")

ONE_AT_A_TIME = Resources(max_concurrent_trials=1)
TWO = Objectives.of({"val_loss": "min", "val_scale": "min"})
SPACE = {"optimizer.lr": {"loguniform": [1e-4, 1e-1]}, "model_args.width": {"randint": [2, 9]}}


@pytest.fixture
def task(root) -> Task:
    """The toy task, with a metric that is small where the loss is not: how far the outputs are from zero."""
    (root / "scale.py").write_text("def scale(outputs, targets):\n    return float(outputs.abs().mean())\n")
    return Task(model="toy:build_model", data="toy:build_data", metrics=[{"reference": "scale:scale", "mode": "min"}])


@pytest.fixture
def stage(task, root, tmp_path, reporter):
    """The stage `tune` itself, with a config as it stands in a file."""

    def run_stage(**config):
        context = StageContext(
            node="search",
            folder=tmp_path,
            root=root,
            task=task,
            seed=0,
            resources=ONE_AT_A_TIME,
            inputs={},
            reporter=reporter,
            cancel=threading.Event(),
        )
        return tune(context, TuneConfig.model_validate(config))

    return run_stage


SETTINGS = {
    "algorithm": "optuna_tpe",
    "space": SPACE,
    "objectives": TWO,
    "trials": 10,
    "train": TrainConfig(epochs=1, batch_size=16),
}


def test_a_search_for_two_objectives_finds_a_front_that_no_trial_dominates(run):
    outcome = run(**SETTINGS)
    assert len(outcome.trials) == 10
    assert outcome.best.metrics["val_loss"] == min(trial.metrics["val_loss"] for trial in outcome.trials)
    assert outcome.best in outcome.front
    for trial in outcome.trials:
        beaten = any(TWO.costs(other.metrics).dominates(TWO.costs(trial.metrics)) for other in outcome.trials)
        assert (trial in outcome.front) == (not beaten)


def test_an_interrupted_search_for_two_objectives_makes_the_suggestions_of_an_uninterrupted_one(run, tmp_path):
    for name in ("whole", "torn"):
        (tmp_path / name).mkdir()
    whole = run(**SETTINGS, folder=tmp_path / "whole")
    lines = (tmp_path / "whole" / "journal.jsonl").read_bytes().splitlines(keepends=True)
    cut = [i for i, line in enumerate(lines) if b'"ended"' in line][6] + 2  # seven ended, the eighth was suggested
    (tmp_path / "torn" / "journal.jsonl").write_bytes(b"".join(lines[:cut]) + lines[cut][:10])

    resumed = run(**SETTINGS, folder=tmp_path / "torn")

    assert [(t.id, t.params, t.status) for t in resumed.trials] == [(t.id, t.params, t.status) for t in whole.trials]
    assert [t.id for t in resumed.front] == [t.id for t in whole.front]
    events = map(json.loads, (tmp_path / "torn" / "journal.jsonl").read_text().splitlines())
    assert [event["id"] for event in events if event["event"] == "restarted"] == ["0008"]


def test_asha_compares_trials_by_the_first_of_two_objectives_and_the_front_has_the_stopped_ones_too(run):
    asha = {"scheduler": AshaSettings(1, 2), "trials": 6, "train": TrainConfig(epochs=4, batch_size=16)}
    outcome = run(**SETTINGS | asha)
    assert {trial.status for trial in outcome.trials} == {"done", "stopped"}
    for trial in outcome.trials:
        rows = dict(trial.history)
        assert [verdict.value for verdict in trial.verdicts] == [rows[v.epoch]["val_loss"] for v in trial.verdicts]
        beaten = any(TWO.costs(other.metrics).dominates(TWO.costs(trial.metrics)) for other in outcome.trials)
        assert (trial in outcome.front) == (not beaten)


GRID = {
    "space": {"optimizer.lr": {"grid": [1e-9, 0.05]}, "model_args.width": 8, "model_args.same": True},
    "algorithm": "grid",
}


def test_the_record_has_the_objectives_and_the_front(stage):
    result = stage(**GRID, objectives=["val_loss", {"val_scale": "min"}], train={"epochs": 4})
    assert result.details["objectives"] == [
        {"metric": "val_loss", "mode": "min"},
        {"metric": "val_scale", "mode": "min"},
    ]
    front = {trial["trial"]: trial for trial in result.details["front"]}
    assert front.keys() == {"0001", "0002"}  # what learned nothing has small outputs and a large loss
    assert result.details["best_trial"] == "0002"
    assert all(front["0002"][metric] == result.metrics[metric] for metric in ("val_loss", "val_scale"))


def test_what_is_beyond_a_limit_is_not_chosen(stage):
    result = stage(**GRID, objective={"metric": "val_loss"}, limits={"val_scale": 0.2}, train={"epochs": 4})
    assert result.details["limits"] == [{"metric": "val_scale", "value": 0.2, "mode": "min"}]
    assert result.details["best_trial"] == "0001"  # the other has the better loss
    assert [trial["trial"] for trial in result.details["front"]] == ["0001"]


def test_a_search_in_which_nothing_is_within_the_limits_ends_and_fails_and_names_the_closest(stage, reporter):
    with pytest.raises(StageError) as failed:
        stage(**GRID, objective={"metric": "val_loss"}, limits={"val_scale": 1e-6}, train={"epochs": 4})
    assert str(failed.value).startswith(
        "none of 2 trials is within the limits: val_scale at most 1e-06; the closest is 0001, with val_scale 0."
    )
    assert str(failed.value).endswith('{"optimizer.lr": 1e-09, "model_args.width": 8, "model_args.same": true}')
    assert [state for state, _ in reporter.ended.values()] == ["done", "done"]
