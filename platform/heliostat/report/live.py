"""A run as it goes: a live table on a terminal, plain lines in a log. Both go to standard error."""

import math
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from heliostat.report.text import duration, figure

if TYPE_CHECKING:
    from heliostat.core.outcome import NodeOutcome
    from heliostat.core.plan import Node, Plan

MARKS = {"ran": ("✓", "green"), "reused": ("=", "cyan"), "failed": ("✗", "red"), "skipped": ("-", "yellow")}
SHOWN = ("val_accuracy", "test_accuracy", "val_loss", "size_mb", "latency_ms")
LINE_EVERY_S = 10.0
"""In a log, how often a node that is under way says how far it is."""


class PlainView:
    """One line for each thing that happens."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._said: dict[str, float] = {}

    def _say(self, text: str) -> None:
        with self._lock:
            self._console.print(f"{time.strftime('%H:%M:%S')} {text}", markup=False, highlight=False, soft_wrap=True)

    def began(self, plan: "Plan", *, log: Path | None) -> None:
        todo = sum(node.status == "run" for node in plan.nodes)
        self._say(f"{plan.pipeline.name}: {len(plan.nodes)} nodes, {todo} to run, {len(plan.nodes) - todo} reused")
        if log is not None:
            self._say(f"what Ray says is kept in {log}")

    def note(self, text: str) -> None:
        self._say(text)

    def started(self, node: "Node") -> None:
        self._said[node.name] = time.monotonic()
        self._say(f"{node.name}: starts ({node.reason})")

    def progress(self, node: "Node", fields: Mapping[str, Any]) -> None:
        if time.monotonic() - self._said.get(node.name, math.inf) >= LINE_EVERY_S:
            self._said[node.name] = time.monotonic()
            self._say(f"{node.name}: {describe_progress(fields)}")

    def warned(self, node: "Node", text: str) -> None:
        self._say(f"{node.name}: warning: {text}")

    def made(self, node: "Node", metrics: Mapping[str, float]) -> None:
        self._say(f"{node.name}: made, to be measured for speed: {', '.join(_figures(metrics))}")

    def ended(self, outcome: "NodeOutcome") -> None:
        self._say(f"{outcome.name}: {describe_outcome(outcome)}")

    def __enter__(self) -> "PlainView":
        return self

    def __exit__(self, *exception: object) -> None:
        return None


class LiveView:
    """A table with a row for each node: its state, how far it is, and the time left where an earlier run tells."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._nodes: list[Node] = []
        self._since: dict[str, float] = {}
        self._fields: dict[str, dict[str, Any]] = {}
        self._outcomes: dict[str, NodeOutcome] = {}
        self._spinner = Spinner("dots")
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=8, transient=False)

    def began(self, plan: "Plan", *, log: Path | None) -> None:
        self._nodes = list(plan.nodes)
        if log is not None:
            self.note(f"what Ray says is kept in {log}")

    def note(self, text: str) -> None:
        self._console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    def started(self, node: "Node") -> None:
        with self._lock:
            self._since[node.name] = time.monotonic()

    def progress(self, node: "Node", fields: Mapping[str, Any]) -> None:
        with self._lock:
            self._fields[node.name] = {**self._fields.get(node.name, {}), **fields}

    def warned(self, node: "Node", text: str) -> None:
        warning = f"{node.name}: warning: {text}"
        self._console.print(warning, style="yellow", markup=False, highlight=False, soft_wrap=True)

    def made(self, node: "Node", metrics: Mapping[str, float]) -> None:
        self.progress(node, {**metrics, "doing": "made, to be measured for speed"})

    def ended(self, outcome: "NodeOutcome") -> None:
        with self._lock:
            self._outcomes[outcome.name] = outcome

    def __enter__(self) -> "LiveView":
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def _render(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        with self._lock:
            for node in self._nodes:
                table.add_row(*self._row(node))
        return Group(table)

    def _row(self, node: "Node") -> tuple[RenderableType, RenderableType, RenderableType, RenderableType]:
        outcome = self._outcomes.get(node.name)
        if outcome is not None:
            mark, style = MARKS[outcome.status]
            took = duration(outcome.seconds) if outcome.status in {"ran", "failed"} else ""
            return Text(mark, style), Text(node.name, style), took, Text(describe_outcome(outcome, brief=True), "dim")
        if node.name in self._since:
            passed = time.monotonic() - self._since[node.name]
            left = f" of ~{duration(node.estimate_s)}" if node.estimate_s else ""
            return (
                self._spinner,
                Text(node.name),
                duration(passed) + left,
                describe_progress(self._fields.get(node.name, {})),
            )
        return Text("·", "dim"), Text(node.name, "dim"), "", Text("waits" if node.status == "run" else "", "dim")


def describe_progress(fields: Mapping[str, Any]) -> str:
    """`7/16 trials, 2 running, 3 stopped, best 0.974` or `epoch 3, val_accuracy 0.95`."""
    if "total" in fields:
        parts = [f"{fields.get('done', 0)}/{fields['total']} trials"]
        parts += [f"{fields[state]} {state}" for state in ("running", "stopped", "failed") if fields.get(state)]
        if fields.get("best") is not None:
            parts.append(f"best {figure(fields['best'])}")
        return ", ".join(parts)
    parts = [f"epoch {fields['epoch']}"] if "epoch" in fields else []
    return ", ".join([*parts, *_figures(fields), *([fields["doing"]] if "doing" in fields else [])])


def _figures(fields: Mapping[str, Any]) -> list[str]:
    return [f"{name} {figure(fields[name])}" for name in SHOWN if name in fields]


def describe_outcome(outcome: "NodeOutcome", *, brief: bool = False) -> str:
    """What became of a node, in one line when `brief`."""
    if outcome.error is not None:
        text = outcome.error.partition("\n")[0] if brief else outcome.error
        return text if brief else f"{outcome.status}: {text}"
    shown = ", ".join(_figures(outcome.metrics))
    if brief:
        return shown
    took = f" in {duration(outcome.seconds)}" if outcome.status == "ran" else ""
    return f"{'done' if outcome.status == 'ran' else 'reused'}{took}{': ' + shown if shown else ''}"
