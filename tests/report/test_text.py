"""How figures and tables look on a terminal."""

import io
import sys

import pytest
from rich.console import Console

from heliostat.core.outcome import NodeOutcome, RunResult
from heliostat.report.text import candidates_table, duration, figure, next_step, table_of


def text_of(renderable, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.99, "10.0 s"),
        (38.4, "38 s"),
        (119.4, "119 s"),
        (119.6, "2 min 00 s"),
        (250, "4 min 10 s"),
        (7500, "2 h 05 min"),
    ],
)
def test_a_duration_reads_as_a_person_would_say_it(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.97456, "0.9746"),
        (1e-5, "1e-05"),
        (12345, "12,345"),
        (12345.0, "12,345"),
        (3, "3"),
        (3.0, "3"),
        (True, "True"),
        ("adam", "adam"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
    ],
)
def test_a_figure_has_four_digits_and_anything_else_is_as_it_is(value, text):
    assert figure(value) == text


def row(model: str, *, chosen: bool = False, why: str = "score 1 vs 0.5", **metrics: float) -> dict[str, object]:
    figures = {"val_accuracy": 0.95, "test_accuracy": 0.94, "size_mb": 1.5, "num_params": 1234567.0, "latency_ms": 0.25}
    return {
        "model": model,
        "chosen": chosen,
        "why": why,
        "speed_up": 2.0,
        "size_ratio": 0.25,
        "metrics": {**figures, **metrics},
    }


WHY = "chosen: latency_ms 2x better, size_mb 3.9x better"
ROWS = [row("train"), row("int8[prune[sparsity=0.5]]", chosen=True, why=WHY)]


@pytest.mark.parametrize("width", [80, 100, 120, 135, 160])
def test_the_table_of_candidates_cuts_no_figure_and_no_reason_at_any_width(width):
    text = text_of(candidates_table(ROWS, "accuracy", width=width), width)
    for word in ("val", "test", "accuracy", "MB", "params", "p50", "ms", "speed-up", "size"):
        assert word in text
    assert ("val accuracy" in text) == ("why" in text) == (width > 140)
    for cell in ("0.95", "0.94", "1.500", "1,234,567", "0.250", "2.0x", "0.250", "int8[prune[spa"):
        assert cell in text
    assert WHY in " ".join(text.split())
    assert "…" not in text


def test_without_a_metric_the_loss_is_shown():
    text = text_of(candidates_table([row("train", val_loss=0.125)], None, width=160), 160)
    assert "accuracy" not in text
    assert "loss" in text
    assert "0.125" in text


def test_square_brackets_in_a_cell_are_not_taken_for_markup():
    assert "prune[sparsity=0.5]" in text_of(table_of(("node", ""), [("prune[sparsity=0.5]", None)]), 80)


def test_the_next_step_after_a_run_opens_the_history_where_that_run_is(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["heliostat"])
    monkeypatch.chdir(tmp_path)
    node = NodeOutcome("train", "train", "train", "ran", "f", tmp_path / "store" / "toy" / "train" / "f")

    def next_of(uri):
        return next_step(RunResult("toy", "done", (node,), {"uri": uri, "experiment": "toy"}, None))

    assert next_of(f"sqlite:///{tmp_path / 'store' / 'mlflow.db'}") == "heliostat ui --storage store"
    assert next_of("sqlite:////srv/all.db") == "mlflow ui --backend-store-uri sqlite:////srv/all.db"
    assert next_of("http://host:5000") == "open http://host:5000 and review the experiment 'toy'"
