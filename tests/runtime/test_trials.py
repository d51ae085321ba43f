import json
import os
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from ray.util import placement_group_table

from heliostat.core.objective import Bound, Objectives
from heliostat.core.spec import Resources, Task
from heliostat.errors import ResourceError, StageError
from heliostat.runtime.journal import Journal
from heliostat.runtime.ledger import trial_seed
from heliostat.runtime.scheduling import AshaSettings, MedianSettings
from heliostat.training.config import TrainConfig

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture
def with_metric(task):
    return lambda reference: Task(**task.model_dump() | {"metrics": [reference]})


def events(folder, kind):
    lines = (folder / "journal.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.mark.parametrize("algorithm", ["random", "bayesian"])
def test_every_trial_is_trained_reported_and_the_best_is_chosen(run, reporter, algorithm):
    outcome = run(algorithm=algorithm, resources=Resources())  # two at a time
    assert [trial.id for trial in outcome.trials] == ["0001", "0002", "0003", "0004"] == sorted(reporter.started)
    assert all(trial.status == "done" and trial.epochs == 2 for trial in outcome.trials)
    assert outcome.best.metrics["val_loss"] == min(row["val_loss"] for t in outcome.trials for _, row in t.history)
    for trial in outcome.trials:
        assert [epoch for epoch, _ in reporter.rows[trial.id]] == [1, 2]
        assert reporter.ended[trial.id] == ("done", None)


def test_grid_search_runs_each_point(run):
    outcome = run(algorithm="grid", space={"model_args.width": {"grid": [2, 4, 8]}}, trials=10)
    assert [trial.params["model_args.width"] for trial in outcome.trials] == [2, 4, 8]


def test_a_trial_gives_the_same_figures_whatever_ran_in_its_process_before(run, tmp_path):
    space = {"model_args.width": {"grid": [2, 4, 8]}}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    once = run(algorithm="grid", space=space, folder=tmp_path / "a")
    reversed_space = {"model_args.width": {"grid": [8, 4, 2]}}
    again = run(algorithm="grid", space=reversed_space, folder=tmp_path / "b")
    (first,) = (t for t in once.trials if t.id == "0002")
    (second,) = (t for t in again.trials if t.id == "0002")
    assert first.params == second.params
    assert [row["val_loss"] for _, row in first.history] == [row["val_loss"] for _, row in second.history]


def test_a_trial_that_raises_is_a_state_with_its_traceback_and_its_process_goes_on(run, reporter):
    outcome = run(algorithm="grid", space={"model_args.fail": {"grid": [None, "raise", None]}, "model_args.width": 5})
    assert [trial.status for trial in outcome.trials] == ["done", "failed", "done"]
    reason = outcome.trials[1].reason
    assert reason.startswith("ValueError: no net is 5 wide")
    assert "toy.py" in reason
    assert "trial_actor" not in reason
    assert reporter.ended["0002"] == ("failed", reason)


def test_a_search_that_succeeds_says_how_many_of_its_trials_failed_and_by_what(run, reporter):
    space = {"model_args.fail": {"grid": [None, "raise", "raise"]}, "model_args.width": 5}
    outcome = run(algorithm="grid", space=space)
    (warning,) = reporter.warnings
    assert re.fullmatch(r"2 of 3 trials failed: 2 like 0002: ValueError: no net is 5 wide \(toy\.py:\d+\)", warning)
    (row,) = outcome.failure_details["failures"]
    assert (row["failed"], row["first"]) == (2, "0002")
    assert row["reason"] in warning


def test_a_trial_whose_objective_is_not_a_number_has_failed(run, with_metric):
    with pytest.raises(StageError, match=r"the task fails .*: val_not_a_number is not a number at epoch 1"):
        run(task=with_metric("toy:not_a_number"), objectives=Objectives.of({"val_not_a_number": "max"}), trials=2)


def test_an_objective_that_nobody_reports_is_named_with_what_is_reported(run):
    with pytest.raises(StageError, match=r"nothing reports 'val_f1'; what is reported: .*val_accuracy"):
        run(objectives=Objectives.of({"val_f1": "max"}), trials=1)


def test_a_trial_whose_process_died_begins_anew_as_often_as_it_may(run, tmp_path, reporter):
    once = {"model_args.once": {"grid": [str(tmp_path / "one"), str(tmp_path / "two")]}}
    outcome = run(algorithm="grid", space=once, retries=1)
    assert [(trial.status, trial.epochs) for trial in outcome.trials] == [("done", 2), ("done", 2)]
    assert [event["id"] for event in events(tmp_path, "restarted")] == ["0001", "0002"]
    died = "its process was killed or crashed; it begins anew"
    assert reporter.warnings == [f"trial 0001: {died}", f"trial 0002: {died}"]
    assert {trial: [epoch for epoch, _ in rows] for trial, rows in reporter.rows.items()} == {
        "0001": [1, 2],
        "0002": [1, 2],
    }


def test_a_trial_that_hangs_has_failed_and_is_told_where_it_was(run, tmp_path):
    resources = Resources(max_concurrent_trials=1, hang_timeout_s=2)
    outcome = run(
        algorithm="grid", space={"model_args.hang": {"grid": [str(tmp_path / "h"), None]}}, resources=resources
    )
    assert [trial.status for trial in outcome.trials] == ["failed", "done"]
    expected = (
        r"it hangs: no sign of life for 2 s \(resources.hang_timeout_s\); .*:\n.*toy\.py\", line \d+ in build_model"
    )
    assert re.match(expected, outcome.trials[0].reason)


def test_a_process_that_dies_each_time_is_a_failed_trial_and_bad_code_is_not_tried_again(run, tmp_path):
    space = {"model_args.fail": {"grid": ["kill", "raise", None]}, "model_args.builds": str(tmp_path / "builds")}
    outcome = run(algorithm="grid", space=space, retries=1)
    assert [trial.status for trial in outcome.trials] == ["failed", "failed", "done"]
    assert "killed or crashed" in outcome.trials[0].reason
    assert (tmp_path / "builds").read_text().split() == ["built"] * 4  # twice, once, once


def test_parameters_that_make_no_config_fail_their_trial_alone(run):
    outcome = run(algorithm="grid", space={"batch_size": {"grid": [16, -1]}})
    assert [trial.status for trial in outcome.trials] == ["done", "failed"]
    assert "batch_size" in outcome.trials[1].reason


def test_asha_stops_trials_that_fall_behind(run, reporter):
    outcome = run(
        algorithm="grid",
        space={"optimizer.lr": {"grid": [0.05, 1e-9, 1e-9, 1e-9]}},
        train=TrainConfig(epochs=4, batch_size=8),
        scheduler=AshaSettings(1, 2),
    )
    assert outcome.trials[0].status == "done"
    stopped = [trial for trial in outcome.trials if trial.status == "stopped"]
    assert stopped
    assert all(trial.epochs < 4 for trial in stopped)
    assert {reporter.ended[trial.id][0] for trial in stopped} == {"stopped"}


def test_all_folds_of_a_trial_stop_together_at_a_rung_by_their_mean(run):
    outcome = run(
        algorithm="grid",
        space={"optimizer.lr": {"grid": [0.05, 1e-9, 1e-9]}},
        train=TrainConfig(epochs=4, batch_size=8),
        scheduler=AshaSettings(1, 2),
        folds=4,
    )
    assert outcome.best.id == "0001"
    assert [trial.status for trial in outcome.trials] == ["done", "stopped", "stopped"]
    for trial in outcome.trials:
        assert [epoch for epoch, _ in trial.history] == list(range(1, trial.epochs + 1))
        assert all(row["val_loss_std"] > 0 for _, row in trial.history)


def test_every_trial_is_compared_on_the_same_folds(run):
    still = {"optimizer.lr": {"grid": [1e-12, 2e-12]}, "model_args.same": True}
    outcome = run(algorithm="grid", space=still, folds=3, train=TrainConfig(epochs=1))
    one, other = (trial.metrics for trial in outcome.trials)
    for figure in ("val_loss", "val_loss_std"):  # the weights are the same, so only other folds would change them
        assert one[figure] == pytest.approx(other[figure], rel=1e-4)


def test_rows_arrive_while_a_long_trial_still_runs(run, reporter):
    slow = TrainConfig(epochs=400, batch_size=1)
    cancel = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        searching = pool.submit(run, train=slow, trials=1, cancel=cancel)
        assert reporter.on_row.wait(60)
        assert not reporter.ended
        cancel.set()
        assert isinstance(searching.exception(timeout=20), KeyboardInterrupt)


@pytest.mark.parametrize("scheduler", [None, AshaSettings(1, 2), MedianSettings(2, 2)])
def test_an_interrupted_search_makes_the_suggestions_of_an_uninterrupted_one(run, tmp_path, scheduler):
    settings = {
        "algorithm": "bayesian",
        "trials": 8,
        "scheduler": scheduler,
        "train": TrainConfig(epochs=4, batch_size=16),
    }
    (tmp_path / "whole").mkdir()
    (tmp_path / "torn").mkdir()
    whole = run(**settings, folder=tmp_path / "whole")
    journal = (tmp_path / "whole" / "journal.jsonl").read_bytes().splitlines(keepends=True)
    ends = [i for i, line in enumerate(journal) if b'"ended"' in line]
    cut = ends[4] + 2  # five trials ended, the sixth was suggested
    (tmp_path / "torn" / "journal.jsonl").write_bytes(b"".join(journal[:cut]) + journal[cut][:10])

    resumed = run(**settings, folder=tmp_path / "torn")

    assert [(t.id, t.params, t.status, t.epochs) for t in resumed.trials] == [
        (t.id, t.params, t.status, t.epochs) for t in whole.trials
    ]
    assert (resumed.best.id, resumed.rungs) == (whole.best.id, whole.rungs)
    assert [t.verdicts for t in resumed.trials] == [t.verdicts for t in whole.trials]
    assert [event["id"] for event in events(tmp_path / "torn", "restarted")] == ["0006"]
    assert len(events(tmp_path / "torn", "ended")) == 8


def test_the_history_is_told_of_an_end_before_the_journal_has_it(run, tmp_path, reporter):
    """What the journal has is not told again on resume: it must have been told before."""
    ended = []

    class Checking(type(reporter)):
        def trial_ended(self, trial, status, **more):
            ended.append((trial, [event["id"] for event in events(tmp_path, "ended")]))

    run(trials=2, reporter=Checking())
    assert ended == [("0001", []), ("0002", ["0001"])]


def test_a_finished_search_is_not_run_again(run, reporter):
    first = run()
    reporter.started.clear()
    assert run() == first
    assert reporter.started == []


def test_interrupting_leaves_a_journal_that_the_search_goes_on_from(run, tmp_path, reporter):
    cancel = threading.Event()
    slow = {"model_args.sleep_s": {"grid": [0.0, 600.0]}}
    threading.Thread(target=lambda: (reporter.on_row.wait(60), time.sleep(0.5), cancel.set())).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(algorithm="grid", space=slow, cancel=cancel)
    assert time.monotonic() - started < 60
    assert [event["id"] for event in events(tmp_path, "ended")] == ["0001"]
    assert [event["id"] for event in events(tmp_path, "suggested")] == ["0001", "0002"]


LONG = TrainConfig(epochs=10_000, batch_size=1)


def test_a_search_ends_with_the_first_trial_that_reaches_the_target(run, reporter):
    target = [Bound("val_loss", 10.0, "min"), Bound("val_accuracy", 0.0, "max")]
    outcome = run(train=LONG, target=target)
    assert outcome.ended_by == "target"
    assert [trial.status for trial in outcome.trials] == ["stopped"]
    assert reporter.ended == {"0001": ("stopped", None)}
    assert outcome.best.metrics["val_loss"] <= 10.0
    assert run(train=LONG, target=target[:1]) == outcome


def test_when_its_time_is_over_a_search_ends_with_the_best_so_far(run, reporter, monkeypatch):
    after_a_row = property(lambda journal: 1e9 if reporter.on_row.is_set() else 0.0)
    monkeypatch.setattr(Journal, "spent_s", after_a_row)
    outcome = run(train=LONG, wall_time_s=60)
    assert (outcome.ended_by, [trial.status for trial in outcome.trials]) == ("wall time", ["stopped"])


def test_time_spent_before_an_interruption_counts(run, tmp_path, reporter):
    run(trials=2)
    path = tmp_path / "journal.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["spent_s"] for line in lines] == sorted(line["spent_s"] for line in lines)
    lines[-1]["spent_s"] = 100.0
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    reporter.started.clear()
    assert run(trials=4, wall_time_s=100.0).ended_by == "wall time"
    assert reporter.started == []


def test_a_trial_that_never_fits_is_refused(run):
    with pytest.raises(ResourceError, match=r"3 worker\(s\) of 1 CPUs each; the cluster has 2 CPUs"):
        run(resources=Resources(workers_per_trial=3))


def test_a_trial_computes_with_the_threads_that_it_was_given(run, task, root):
    (root / "threads.py").write_text(
        "import torch\ndef threads(outputs, targets):\n    return float(torch.get_num_threads())\n"
    )
    counted = Task(**{**task.model_dump(), "metrics": ["threads:threads"]})
    outcome = run(task=counted, trials=1, resources=Resources(cpus_per_worker=2))
    assert outcome.best.metrics["val_threads"] == 2


def test_trials_have_seeds_of_their_own():
    assert len({trial_seed(0, f"{i:04d}") for i in range(100)} | {trial_seed(1, "0001")}) == 101


@pytest.mark.slow
def test_a_trial_of_several_workers_trains_through_ray_train(run, reporter):
    outcome = run(trials=2, resources=Resources(workers_per_trial=2), scheduler=AshaSettings(1, 2))
    assert outcome.trials[0].status == "done"
    assert [epoch for epoch, _ in reporter.rows["0001"]] == [1, 2]


@pytest.mark.slow
def test_a_process_that_is_killed_from_outside_costs_its_trial_alone(run, with_metric, reporter):
    def kill() -> None:
        reporter.on_row.wait(60)
        ((_, row),) = reporter.rows["0001"][:1]
        os.kill(int(row["val_pid"]), signal.SIGKILL)

    threading.Thread(target=kill).start()
    outcome = run(task=with_metric("toy:pid"), trials=3, train=TrainConfig(epochs=300, batch_size=1))
    assert [trial.status for trial in outcome.trials] == ["failed", "done", "done"]


def processes_of_trials():
    """Those of this process's own Ray."""

    def parent(pid):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (path / "cmdline").read_bytes().startswith(b"ray::Trials"):
                raylet = parent(int(path.name))
                found += [int(path.name)] if parent(raylet) == os.getpid() else []
    return found


def placement_groups():
    return [group for group in placement_group_table().values() if group["state"] != "REMOVED"]


SLOW_STEPS = {"model_args.step_s": 1.0, "model_args.width": 4}


@pytest.mark.slow
def test_a_trial_of_several_workers_whose_process_died_begins_anew(run, reporter):
    def kill() -> None:
        reporter.on_row.wait(60)
        (process,) = processes_of_trials()
        os.kill(process, signal.SIGKILL)

    threading.Thread(target=kill).start()
    outcome = run(space=SLOW_STEPS, trials=1, resources=Resources(workers_per_trial=2), retries=1)
    assert [trial.status for trial in outcome.trials] == ["done"]
    assert len(reporter.warnings) == 1
    assert placement_groups() == []


@pytest.mark.slow
def test_the_workers_of_a_trial_that_is_stopped_hold_nothing_when_the_search_is_over(run):
    target = [Bound("val_loss", 10.0, "min")]
    slow = TrainConfig(epochs=50, batch_size=1)
    outcome = run(space=SLOW_STEPS, train=slow, trials=1, target=target, resources=Resources(workers_per_trial=2))
    assert outcome.ended_by == "target"
    assert placement_groups() == []
