"""Early stopping: what the schedulers decide, by which cut, and what they remember after an interruption."""

import random
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np
import pytest
from ray.tune.schedulers import TrialScheduler

from heliostat.core.spec import Resources
from heliostat.runtime.journal import TrialRecord
from heliostat.runtime.scheduling import AshaSettings, MedianSettings, Rung, make_scheduler, rung_table
from heliostat.stages.tune_config import AshaConfig, MedianConfig
from heliostat.training.config import TrainConfig

EPOCHS, TRIALS = 9, 40
SETTINGS = [AshaSettings(1, 2), AshaSettings(2, 3), MedianSettings(1, 3), MedianSettings(4, 2)]


@dataclass(frozen=True)
class TuneTrial:
    """What a scheduler sees of a trial of Tune."""

    name: str

    @property
    def trial_id(self):
        return f"tune-{self.name}"

    @property
    def config(self):
        return {"trial": self.name}


def curves(seed=0):
    """The values that each trial would report, most of them over all epochs; some fail, some end early."""
    rng = random.Random(seed)
    for number in range(1, TRIALS + 1):
        start, slope = rng.random(), rng.gauss(0, 0.05)
        length = EPOCHS if rng.random() < 0.8 else rng.randint(1, EPOCHS)
        values = [start + slope * epoch + rng.gauss(0, 0.1) for epoch in range(length)]
        yield f"{number:04d}", values, "failed" if rng.random() < 0.3 else "done"


def run_through(scheduler, name, values, status):
    """One trial after another, as Tune tells a scheduler of it: its record in the end."""
    trial, verdicts, last = TuneTrial(name), [], len(values)
    scheduler.on_trial_add(None, trial)
    for epoch, value in enumerate(values, start=1):
        if epoch not in scheduler.compared_at:
            continue
        decision = scheduler.on_trial_result(None, trial, {"epoch": epoch, "value": value})
        verdicts.append(scheduler.take_verdict())
        if decision == TrialScheduler.STOP:
            status, last = "stopped", epoch
            break
    ended = {} if status == "failed" else {"epoch": last, "value": values[last - 1]}
    scheduler.on_trial_complete(None, trial, ended)
    history = [(epoch, {"acc": value}) for epoch, value in enumerate(values[:last], start=1)]
    return TrialRecord(name, {}, status, {}, last, None, 0.0, history, verdicts)


def search(settings, mode, *, remembered=()):
    scheduler = make_scheduler(settings, epochs=EPOCHS, mode=mode)
    scheduler.remember(remembered, metric="acc")
    known = {trial.id for trial in remembered}
    later = [run_through(scheduler, *curve) for curve in curves() if curve[0] not in known]
    return [*remembered, *later]


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("ended", [1, 13, 30])
def test_a_scheduler_that_remembers_decides_as_one_that_saw_it_all(settings, mode, ended):
    whole = search(settings, mode)
    assert search(settings, mode, remembered=whole[:ended]) == whole
    assert {trial.status for trial in whole} == {"done", "stopped", "failed"}


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_trial_is_stopped_when_it_is_worse_than_its_cut_and_only_then(settings, mode):
    for trial in search(settings, mode):
        for verdict in trial.verdicts:
            worse = verdict.cut is not None and (
                verdict.value < verdict.cut if mode == "max" else verdict.value > verdict.cut
            )
            assert verdict.stopped == worse
        assert (trial.status == "stopped") == any(verdict.stopped for verdict in trial.verdicts)


@pytest.mark.parametrize("mode", ["max", "min"])
def test_the_cut_of_asha_is_what_the_best_of_those_before_reached(mode):
    before = {1: [], 2: [], 4: [], 8: []}
    for trial in search(AshaSettings(1, 2), mode):
        for verdict in trial.verdicts:
            assert verdict.value == dict(trial.history)[verdict.epoch]["acc"]
            expected = np.percentile(before[verdict.epoch], 50) if before[verdict.epoch] else None
            assert verdict.cut == (None if expected is None else pytest.approx(expected))
            before[verdict.epoch].append(verdict.value)


def test_the_cut_of_the_median_rule_is_the_median_of_the_means_of_the_others_since_the_grace():
    grace, least = 4, 2
    before = []
    for trial in search(MedianSettings(grace, least), "max"):
        seen = [row["acc"] for _, row in trial.history]
        for verdict in trial.verdicts:
            means = [fmean(one[grace - 1 : verdict.epoch]) for one in before if len(one) >= verdict.epoch >= grace]
            assert verdict.cut == (pytest.approx(median(means)) if len(means) >= least else None)
            assert verdict.value == max(seen[: verdict.epoch])
        shown = seen if trial.status != "failed" else seen[: EPOCHS - 1]
        before += [shown] if shown else []


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_trial_that_begins_anew_is_compared_anew(settings):
    """Its process died, and Tune adds it again."""
    scheduler, untroubled = (make_scheduler(settings, epochs=EPOCHS, mode="max") for _ in range(2))
    for curve in list(curves())[:20]:
        run_through(scheduler, *curve)
        run_through(untroubled, *curve)
    died = TuneTrial("last")
    scheduler.on_trial_add(None, died)
    for epoch in scheduler.compared_at[:2]:
        scheduler.on_trial_result(None, died, {"epoch": epoch, "value": 9.0})
    assert run_through(scheduler, "last", [0.5] * EPOCHS, "done") == run_through(
        untroubled, "last", [0.5] * EPOCHS, "done"
    )


@pytest.mark.parametrize(
    ("grace", "factor", "epochs", "expected"),
    [(1, 3, 9, [1, 3]), (1, 3, 10, [1, 3, 9]), (2, 2, 9, [2, 4, 8]), (5, 3, 4, []), (1, 10, 1000, [1, 10, 100])],
)
def test_rungs_are_epochs_that_grow_by_the_reduction_factor(grace, factor, epochs, expected):
    scheduler = make_scheduler(AshaSettings(grace, factor), epochs=epochs, mode="max")
    assert list(scheduler.compared_at) == expected
    stated = AshaConfig(grace_epochs=grace, reduction_factor=factor)
    assert list(stated.compared_at(epochs)) == expected


def test_the_median_rule_compares_after_every_epoch_but_the_last():
    scheduler = make_scheduler(MedianSettings(2, 3), epochs=4, mode="max")
    assert list(MedianConfig(grace_epochs=2).compared_at(4)) == list(scheduler.compared_at) == [1, 2, 3]


@pytest.mark.parametrize("scheduler", [AshaSettings(1, 2), MedianSettings(1, 1)], ids=str)
def test_the_rung_table_tells_what_happened_to_the_trials(run, ray_session, scheduler):
    """Two at a time: the order in which they are compared is not that in which they were suggested."""
    outcome = run(
        algorithm="grid",
        trials=6,
        space={"optimizer.lr": {"grid": [0.05, 1e-9, 0.02, 1e-9, 1e-9, 0.03]}},
        train=TrainConfig(epochs=4, batch_size=8),
        scheduler=scheduler,
        resources=Resources(max_concurrent_trials=2),
    )
    stopped = {trial.id: trial.epochs for trial in outcome.trials if trial.status == "stopped"}
    assert stopped
    epochs = [1, 2, 4] if isinstance(scheduler, AshaSettings) else [1, 2, 3, 4]
    for rung, epoch in zip(outcome.rungs, epochs, strict=True):
        cuts = [v.cut for trial in outcome.trials for v in trial.verdicts if v.epoch == epoch and v.cut is not None]
        assert rung == Rung(
            epoch,
            reached=sum(any(row == epoch for row, _ in trial.history) for trial in outcome.trials),
            stopped=list(stopped.values()).count(epoch),
            lowest_cut=min(cuts, default=None),
            highest_cut=max(cuts, default=None),
        )
    assert (outcome.rungs[0].reached, outcome.rungs[-1].stopped) == (6, 0)
    for trial in outcome.trials:
        for verdict in trial.verdicts:
            assert verdict.stopped == (verdict.cut is not None and verdict.value > verdict.cut)


def test_without_trials_a_rung_is_empty():
    assert rung_table([], epochs=[1]) == [Rung(1, 0, 0, None, None)]
