"""A search killed at any moment: its journal cut at each line and at any byte, and then led on. No Ray takes part."""

import json
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heliostat.core.objective import Objective, Objectives
from heliostat.core.space import Space
from heliostat.core.stage import Unheard
from heliostat.runtime.engines import engines
from heliostat.runtime.journal import Journal
from heliostat.runtime.ledger import Budget, Ledger

TRIALS = 9
LOSS = Objectives((Objective("val_loss", "min"),))
SPACE = Space.parse(
    {
        "optimizer.lr": {"loguniform": [1e-4, 1e-1]},
        "model_args.width": {"choice": [2, 4, 8]},
        "optimizer.name": {"choice": ["adam", {"value": "sgd", "space": {"optimizer.momentum": {"uniform": [0, 1]}}}]},
    }
)
SAMPLING = [name for name, kind in engines().items() if not kind.exhaustive]


def carry_on(folder: Path, algorithm: str, *, at_once: int = 1) -> list[str]:
    """Lead the search in `folder` to its end, with trials whose figures follow from their parameters and seeds."""
    engine = engines()[algorithm].make(SPACE, num_objectives=1, seed=5, trials=TRIALS)
    journal = Journal(folder / "journal.jsonl")
    ledger = Ledger(engine, journal, Unheard(), budget=Budget(TRIALS), seed=5, objectives=LOSS)
    left, running, ran = ledger.left, [], []
    while True:
        while len(running) < min(at_once, left - len(ran)) and (trial := ledger.next()):
            running.append(trial)
        if not running:
            journal.close()
            return ran
        trial = running.pop(len(ran) % len(running))
        ran.append(trial["trial"])
        loss = len(trial["params"]) + trial["seed"] % 1000 / 1000
        for epoch in (1, 2):
            ledger.rows(trial["trial"], [(epoch, {"val_loss": loss / epoch})])
        if trial["seed"] % 4 == 0:
            ledger.ended(trial["trial"], "failed", "ValueError: it is a multiple of four")
        else:
            ledger.ended(trial["trial"], "stopped" if trial["seed"] % 3 == 0 else "done", None)


@cache
def whole(algorithm: str, at_once: int = 1) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        carry_on(Path(folder), algorithm, at_once=at_once)
        return (Path(folder) / "journal.jsonl").read_bytes()


def events(journal: bytes, kind: str) -> list[dict]:
    return [event for event in map(json.loads, journal.splitlines()) if event["event"] == kind]


def cut_and_carried_on(algorithm: str, kept: int, *, at_once: int = 1) -> tuple[bytes, list[str]]:
    """The journal after the search that lost all but its first `kept` bytes has ended, and the trials that ran then."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.jsonl"
        path.write_bytes(whole(algorithm, at_once)[:kept])
        ran = carry_on(Path(folder), algorithm, at_once=at_once)
        return path.read_bytes(), ran


def check_nothing_is_lost_or_run_twice(algorithm: str, kept: int, *, at_once: int = 1) -> bytes:
    before = whole(algorithm, at_once)[:kept]
    before = before[: before.rfind(b"\n") + 1]
    journal, ran = cut_and_carried_on(algorithm, kept, at_once=at_once)
    assert journal.startswith(before)
    had_ended = {event["id"] for event in events(before, "ended")}
    assert Counter(event["id"] for event in events(journal, "ended")) == {f"{n + 1:04d}": 1 for n in range(TRIALS)}
    assert Counter(ran) == {f"{n + 1:04d}": 1 for n in range(TRIALS) if f"{n + 1:04d}" not in had_ended}
    return journal


def check_it_is_the_search_that_was_never_cut(algorithm: str, kept: int) -> None:
    journal = check_nothing_is_lost_or_run_twice(algorithm, kept)
    for kind, fields in (("suggested", ("id", "params")), ("ended", ("id", "status", "reason"))):
        told, expected = ([[e[f] for f in fields] for e in events(j, kind)] for j in (journal, whole(algorithm)))
        assert told == expected


@pytest.mark.parametrize("algorithm", SAMPLING)
def test_a_search_cut_at_any_line_makes_the_same_suggestions_and_comes_to_the_same_end(algorithm):
    journal = whole(algorithm)
    assert {event["status"] for event in events(journal, "ended")} == {"done", "stopped", "failed"}
    for end in [0, *(i + 1 for i, byte in enumerate(journal) if byte == ord("\n"))]:
        check_it_is_the_search_that_was_never_cut(algorithm, end)


@pytest.mark.parametrize("algorithm", SAMPLING)
@settings(max_examples=15, deadline=None)
@given(share=st.floats(0, 1))
def test_a_search_cut_at_any_byte_makes_the_same_suggestions_and_comes_to_the_same_end(algorithm, share):
    check_it_is_the_search_that_was_never_cut(algorithm, round(share * len(whole(algorithm))))


@settings(max_examples=30, deadline=None)
@given(share=st.floats(0, 1))
def test_a_search_with_several_trials_at_once_loses_none_and_runs_none_twice(share):
    check_nothing_is_lost_or_run_twice("bayesian", round(share * len(whole("bayesian", 3))), at_once=3)
