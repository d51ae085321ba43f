import json
import threading

import pytest

from heliostat.core.artifact import Artifact, Record
from heliostat.core.spec import Resources
from heliostat.core.stage import StageContext
from heliostat.stages.tune import TuneConfig, tune

pytestmark = pytest.mark.usefixtures("ray_session")

SPACE = {"optimizer.lr": {"loguniform": [1e-3, 1e-1]}, "model_args.width": {"choice": [2, 4, 8]}}
GIVEN = [{"optimizer.lr": 0.05, "model_args.width": 8}, {"optimizer.lr": 0.002, "model_args.width": 2}]


@pytest.fixture
def context(task, root, tmp_path, reporter):
    """What the stage is given, with a new folder of that name."""

    def make(name, **inputs):
        (tmp_path / name).mkdir()
        return StageContext(
            node=name,
            folder=tmp_path / name,
            root=root,
            task=task,
            seed=0,
            resources=Resources(max_concurrent_trials=1),
            inputs=inputs,
            reporter=reporter,
            cancel=threading.Event(),
        )

    return make


@pytest.mark.parametrize("algorithm", ["random", "bayesian", "optuna_tpe"])
def test_a_search_tries_what_it_is_given_first_and_goes_on_the_same_after_an_interruption(run, tmp_path, algorithm):
    settings = {"algorithm": algorithm, "trials": 5, "start_from": GIVEN}
    (tmp_path / "whole").mkdir()
    (tmp_path / "torn").mkdir()
    whole = run(**settings, folder=tmp_path / "whole")
    assert [dict(trial.params) for trial in whole.trials[:2]] == GIVEN
    journal = (tmp_path / "whole" / "journal.jsonl").read_bytes().splitlines(keepends=True)
    ends = [i for i, line in enumerate(journal) if b'"ended"' in line]
    (tmp_path / "torn" / "journal.jsonl").write_bytes(b"".join(journal[: ends[2] + 1]))
    resumed = run(**settings, folder=tmp_path / "torn")
    assert [(t.id, t.params, t.status) for t in resumed.trials] == [(t.id, t.params, t.status) for t in whole.trials]


def test_a_search_learns_from_the_trials_of_an_earlier_one_and_runs_none_of_them_again(context):
    config = {"space": SPACE, "train": {"epochs": 1, "batch_size": 16}, "objective": {"metric": "val_loss"}}
    before, warm = context("before"), context("warm")
    tune(before, TuneConfig.model_validate({**config, "algorithm": "random", "trials": 5}))
    start = {"start_from": [{"trials": str(before.folder)}], "algorithm": "bayesian", "trials": 2}
    found = tune(warm, TuneConfig.model_validate({**config, **start}))
    assert found.details["learned_from"] == "5 earlier trials"
    tried, then = (json.loads((given.folder / "trials.json").read_text()) for given in (warm, before))
    assert [trial["id"] for trial in tried] == ["0001", "0002"]
    assert not [trial for trial in tried if trial["params"] in [other["params"] for other in then]]

    fields = dict.fromkeys(["pipeline", "node", "stage", "uses", "fingerprint"], "before")
    in_the_slot = context("slot", start_from=(Artifact(before.folder, Record(kind="params", identity={}, **fields)),))
    tune(in_the_slot, TuneConfig.model_validate({**config, "algorithm": "bayesian", "trials": 2}))
    same = json.loads((in_the_slot.folder / "trials.json").read_text())
    assert [trial["params"] for trial in same] == [trial["params"] for trial in tried]


def test_a_narrow_search_of_which_no_earlier_trial_lies_in_the_space_says_so_and_goes_on(context, reporter):
    config = {"space": SPACE, "train": {"epochs": 1, "batch_size": 16}, "algorithm": "bayesian", "trials": 1}
    before = context("before")
    tune(before, TuneConfig.model_validate(config))
    fields = dict.fromkeys(["pipeline", "node", "stage", "uses", "fingerprint"], "before")
    artifact = Artifact(before.folder, Record(kind="params", identity={}, **fields))
    narrow = {**config, "space": {**SPACE, "optimizer.lr": {"uniform": [0.05, 0.0501]}}}
    found = tune(context("narrow", start_from=(artifact,)), TuneConfig.model_validate(narrow))
    assert found.details["trials"]["done"] == 1
    (warning,) = reporter.warnings
    assert warning.startswith("nothing to learn from before: 0 of 1, 1 outside the space; trial 0001: optimizer.lr: ")


def test_a_search_that_learns_first_tries_what_the_file_would_train_with(context):
    train = {"epochs": 1, "batch_size": 16, "optimizer": {"lr": 0.02}, "model_args": {"width": 8}}
    given = context("known")
    found = tune(
        given, TuneConfig.model_validate({"space": SPACE, "train": train, "algorithm": "bayesian", "trials": 2})
    )
    first, _ = json.loads((given.folder / "trials.json").read_text())
    assert first["params"] == {"optimizer.lr": 0.02, "model_args.width": 8}
    assert found.metrics["val_loss"] <= first["metrics"]["val_loss"]
