"""A run as it goes: plain lines in a log, a table on a terminal."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from heliostat.core.load import load_pipeline
from heliostat.core.outcome import NodeOutcome
from heliostat.report.live import LiveView, PlainView, describe_outcome, describe_progress
from heliostat.runner import plan


def outcome(name: str, status: str = "ran", **more) -> NodeOutcome:
    return NodeOutcome(name, name.partition("[")[0], "train", status, "0" * 16, Path("/store"), **more)


DONE = outcome("train", seconds=12.3, metrics={"val_accuracy": 0.97456, "latency_ms": 0.25, "num_params": 10})
FAILED = outcome("prune[sparsity=0.5]", "failed", seconds=1, error="ValueError: no\n  at toy.py line 3")


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"total": 16}, "0/16 trials"),
        (
            {"total": 16, "done": 7, "running": 2, "stopped": 3, "failed": 1, "best": 0.97456},
            "7/16 trials, 2 running, 3 stopped, 1 failed, best 0.9746",
        ),
        ({"epoch": 3, "val_accuracy": 0.95, "other": 1}, "epoch 3, val_accuracy 0.95"),
        ({"epoch": 3, "doing": "measuring"}, "epoch 3, measuring"),
        ({}, ""),
    ],
)
def test_progress_is_told_in_one_line(fields, text):
    assert describe_progress(fields) == text


@pytest.mark.parametrize(
    ("ended", "full", "brief"),
    [
        (DONE, "done in 12 s: val_accuracy 0.9746, latency_ms 0.25", "val_accuracy 0.9746, latency_ms 0.25"),
        (outcome("train", "reused"), "reused", ""),
        (FAILED, "failed: ValueError: no\n  at toy.py line 3", "ValueError: no"),
        (outcome("best", "skipped", error="needs train"), "skipped: needs train", "needs train"),
    ],
)
def test_what_became_of_a_node_is_told(ended, full, brief):
    assert describe_outcome(ended) == full
    assert describe_outcome(ended, brief=True) == brief


@pytest.fixture
def planned(toy):
    return plan(load_pipeline(toy.file))


def test_a_log_has_a_line_for_each_thing_that_happens(planned):
    console = Console(file=io.StringIO(), width=40)
    train = planned.node("train")
    with PlainView(console) as view:
        view.began(planned, log=Path("/store/logs/toy.log"))
        view.started(train)
        view.progress(train, {"epoch": 1})
        view.warned(train, "checkpoint 7 is damaged")
        view.note("stopping: what is finished is kept")
        view.made(train, {"val_accuracy": 0.97456, "num_params": 10})
        view.ended(DONE)
        view.ended(FAILED)
    lines = [line[9:] for line in console.file.getvalue().splitlines()]
    assert lines[:8] == [
        "toy: 10 nodes, 10 to run, 0 reused",
        "what Ray says is kept in /store/logs/toy.log",
        "train: starts (first run)",
        "train: warning: checkpoint 7 is damaged",
        "stopping: what is finished is kept",
        "train: made, to be measured for speed: val_accuracy 0.9746",
        "train: done in 12 s: val_accuracy 0.9746, latency_ms 0.25",
        "prune[sparsity=0.5]: failed: ValueError: no",
    ]


def test_a_terminal_has_a_row_for_each_node_that_ends_as_it_became(planned):
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    search, train = planned.node("search"), planned.node("train")
    with LiveView(console) as view:
        view.began(planned, log=Path("/store/logs/toy.log"))
        view.started(search)
        view.progress(search, {"total": 4, "done": 1})
        view.progress(search, {"running": 2})
        view.ended(DONE)
        view.started(train)
        view.warned(train, "checkpoint 7 is damaged")
        view.ended(FAILED)
        view.ended(outcome("int8[train]", "skipped", error="needs train"))
    assert "train: warning: checkpoint 7 is damaged\n" in console.file.getvalue()
    last = console.file.getvalue().rpartition("what Ray says")[2]
    for words in (
        ("search", "1/4 trials, 2 running"),
        ("✓", "train", "12 s", "val_accuracy 0.9746"),
        ("✗", "prune[sparsity=0.5]", "1.0 s", "ValueError: no"),
        ("-", "int8[train]", "needs train"),
        ("·", "best", "waits"),
    ):
        assert any(all(word in line for word in words) for line in last.splitlines()), words
    assert "at toy.py line 3" not in last
