from pathlib import Path

import pytest

from heliostat.core.objective import Objectives
from heliostat.runtime.journal import Ended, Journal, Reported, Restarted, Standing, Suggested


def write(path: Path, *events) -> None:
    journal = Journal(path)
    for event in events:
        journal.append(event)
    journal.close()


def read(path: Path) -> list:
    journal = Journal(path)
    journal.close()
    return journal.past


def standing(*events) -> Standing:
    state = Standing()
    for event in events:
        state.apply(event, Objectives.of({"val_loss": "min"}))
    return state


EVENTS = (
    Suggested("0001", {"optimizer.lr": 0.1, "model_args.layers": [8, {"width": None}]}),
    Reported("0001", [(1, {"val_loss": 2.0}), (2, {"val_loss": float("inf")})]),
    Ended("0001", "stopped", None, 0.5),
)


def test_events_come_back_as_they_were_written(tmp_path):
    write(tmp_path / "journal", *EVENTS)
    assert read(tmp_path / "journal") == list(EVENTS)


@pytest.mark.parametrize("lost", [1, 5, 30])
def test_a_torn_last_line_is_cut_off_and_the_file_goes_on_after_it(tmp_path, lost):
    path = tmp_path / "journal"
    write(path, *EVENTS)
    path.write_bytes(path.read_bytes()[:-lost])
    assert read(path) == list(EVENTS[:2])
    write(path, EVENTS[2])
    assert read(path) == list(EVENTS)


def test_a_trial_is_judged_by_its_best_epoch(tmp_path):
    trial = standing(
        Suggested("0001", {}),
        Reported("0001", [(1, {"val_loss": 2.0})]),
        Reported("0001", [(2, {"val_loss": 1.0}), (3, {"val_loss": float("nan")})]),
        Ended("0001", "done", None, 1.0),
    ).ended["0001"]
    assert (trial.metrics, trial.epochs) == ({"val_loss": 1.0}, 3)


def test_a_trial_that_begins_anew_forgets_its_rows():
    state = standing(Suggested("0001", {}), Reported("0001", [(1, {"val_loss": 2.0})]), Restarted("0001"))
    assert state.open["0001"].history == []
    assert not state.ended
