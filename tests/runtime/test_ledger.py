"""What a search makes of what its trials report, without Ray."""

import pytest

from heliostat.core.objective import Bound, Objectives
from heliostat.core.space import Space
from heliostat.core.stage import Unheard
from heliostat.runtime.engines import engines
from heliostat.runtime.journal import Journal, TrialRecord
from heliostat.runtime.ledger import Budget, Ledger

SPACE = Space.parse({"a": {"uniform": [0.0, 1.0]}})
ONE = Objectives.of({"gain": "max"})
TWO = Objectives.of({"gain": "max", "cost": "min"})


class Watching(Unheard):
    def __init__(self):
        self.seen = {}

    def progress(self, **fields):
        self.seen = fields


@pytest.fixture
def ledger(tmp_path):
    """A ledger on the journal of the test's folder: opened again, it goes on."""

    def open_ledger(objectives=TWO, *, algorithm="random", trials=9, target=(), reporter=None, **more):
        engine = engines()[algorithm].make(SPACE, num_objectives=len(objectives.ordered), seed=0, trials=trials)
        journal = Journal(tmp_path / "journal.jsonl")
        watcher = reporter or Unheard()
        return Ledger(
            engine, journal, watcher, budget=Budget(trials, None, target), seed=0, objectives=objectives, **more
        )

    return open_ledger


def run_trial(ledger, *rows, status="done"):
    trial = ledger.next()["trial"]
    ledger.rows(trial, list(enumerate(rows, 1)))
    ledger.ended(trial, status, "its reason" if status == "failed" else None)
    return ledger.standing.ended[trial]


def test_a_trial_that_reports_a_figure_only_at_some_epochs_is_judged_by_those(ledger):
    trial = run_trial(ledger(), {"gain": 9.0}, {"gain": 2.0, "cost": 1.0}, {"gain": 3.0, "cost": 4.0}, {"gain": 5.0})
    assert (trial.status, trial.metrics, trial.epochs) == ("done", {"gain": 3.0, "cost": 4.0}, 4)


@pytest.mark.parametrize("status", ["done", "stopped"])
def test_a_trial_none_of_whose_epochs_has_every_figure_has_failed(ledger, status):
    trial = run_trial(ledger(), {"gain": 9.0}, {"loss": 2.0}, status=status)
    assert (trial.status, trial.metrics) == ("failed", {})
    assert trial.reason == "no epoch reports gain and cost; what is reported: gain, loss"


@pytest.mark.parametrize("algorithm", ["random", "bayesian", "optuna_tpe"])
def test_a_trial_that_the_end_of_the_search_stops_before_it_is_judged_is_no_failure(ledger, algorithm):
    target = [Bound("loss", 1.0, "min")]
    watching = Watching()
    first = ledger(ONE, algorithm=algorithm, target=target, reporter=watching)
    trials = [first.next()["trial"] for _ in range(3)]
    for trial, row in zip(trials, [{"loss": 2.0}, {"loss": 0.5}, {}], strict=True):
        first.rows(trial, [(1, row)] if row else [])
    first.ended(trials[0], "stopped", None)
    first.end_open()
    ended = first.standing.ended.values()
    assert {trial.status for trial in ended} == {"stopped"}
    assert {trial.reason for trial in ended} == {"the search ended before an epoch of it reported gain"}
    assert (watching.seen["stopped"], watching.seen["failed"], watching.seen["best"]) == (3, 0, None)
    assert ledger(ONE, algorithm=algorithm, target=target).over == "target"


@pytest.mark.parametrize("algorithm", ["random", "optuna_tpe"])
def test_whoever_watches_sees_the_best_so_far_also_after_an_interruption(ledger, algorithm):
    watching = Watching()
    first = ledger(algorithm=algorithm, reporter=watching)
    run_trial(first, {"gain": 1.0, "cost": 1.0})
    run_trial(first, {"gain": 3.0, "cost": 3.0})
    assert watching.seen["best"] == 3.0
    run_trial(first, {"gain": 9.0}, status="failed")
    run_trial(first, {"gain": 2.0, "cost": 1.0}, status="stopped")
    so_far = {"done": 4, "total": 9, "running": 0, "stopped": 1, "failed": 1, "best": 3.0}
    assert watching.seen == so_far

    again = Watching()
    ledger(algorithm=algorithm, reporter=again).next()
    assert again.seen == so_far | {"running": 1}


def test_the_best_so_far_is_within_the_limits(ledger):
    watching = Watching()
    limited = ledger(Objectives.of({"gain": "max"}, Bound("cost", 2.0, "min")), reporter=watching)
    run_trial(limited, {"gain": 5.0, "cost": 3.0})
    assert watching.seen["best"] is None
    run_trial(limited, {"gain": 1.0, "cost": 2.0})
    run_trial(limited, {"gain": 7.0, "cost": 2.1})
    assert watching.seen["best"] == 1.0


@pytest.mark.parametrize("algorithm", ["random", "bayesian", "optuna_tpe"])
def test_a_search_starts_from_the_points_that_it_is_given_and_goes_on_as_it_would_have(ledger, algorithm):
    start_from = [{"a": 0.25}, {"a": 0.5}]
    one = Objectives.of({"gain": "max"})
    first = ledger(one, algorithm=algorithm, start_from=start_from)
    seen = [run_trial(first, {"gain": float(index)}).params for index in range(6)]
    assert seen[:2] == start_from
    assert seen[2] not in start_from
    again = ledger(one, algorithm=algorithm, start_from=start_from)  # leads a fresh engine through the journal
    assert again.next()["params"] == first.next()["params"]


def earlier_trials(number):
    """What a search knows that found the best near 0.8."""
    for index in range(number):
        a = index / number
        yield TrialRecord(f"{index:04d}", {"a": a}, "done", {"gain": -abs(a - 0.8), "cost": a}, 1, None, 1.0)


@pytest.mark.parametrize(("algorithm", "objectives"), [("bayesian", ONE), ("optuna_tpe", ONE), ("optuna_tpe", TWO)])
def test_a_search_learns_from_earlier_trials_that_it_does_not_count_and_goes_on_as_it_would_have(
    ledger, algorithm, objectives
):
    settings = {"algorithm": algorithm, "earlier": list(earlier_trials(30)), "start_from": [{"a": 0.25}]}
    first = ledger(objectives, **settings)
    seen = [run_trial(first, {"gain": -1.0, "cost": 1.0}).params["a"] for _ in range(6)]
    assert seen[0] == 0.25
    if objectives is ONE:
        assert sum(abs(a - 0.8) < 0.2 for a in seen[1:]) >= 4
    assert list(first.standing.ended) == ["0001", "0002", "0003", "0004", "0005", "0006"]
    again = ledger(objectives, **settings)
    assert again.left == first.left == 3
    assert again.next()["params"] == first.next()["params"]


def test_a_journal_whose_whole_steps_are_written_as_real_numbers_goes_on(tmp_path):
    space = Space.parse({"a": {"quniform": [16, 64, 16]}})

    def open_ledger():
        engine = engines()["random"].make(space, num_objectives=1, seed=0, trials=9)
        budget = Budget(9, None, ())
        return Ledger(engine, Journal(tmp_path / "journal.jsonl"), Unheard(), budget=budget, seed=0, objectives=ONE)

    first = run_trial(open_ledger(), {"gain": 1.0})
    journal = tmp_path / "journal.jsonl"
    journal.write_text(journal.read_text().replace(f'"a": {first.params["a"]}', f'"a": {first.params["a"]}.0'))
    assert ".0" in journal.read_text().splitlines()[0]
    assert len(open_ledger().standing.ended) == 1
