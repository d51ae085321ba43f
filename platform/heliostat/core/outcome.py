"""What became of a run and of its nodes, and who may watch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from heliostat.core.plan import Node, Plan, record_of

Status = Literal["ran", "reused", "failed", "skipped"]


@dataclass(frozen=True)
class NodeOutcome:
    """What became of a node. `error` is the reason for `failed` and `skipped`."""

    name: str
    stage: str
    uses: str
    status: Status
    fingerprint: str
    path: Path
    seconds: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None


def outcome_of(node: Node, status: Status, **more: Any) -> NodeOutcome:
    return NodeOutcome(node.name, node.stage, node.uses, status, node.fingerprint, node.folder, **more)


def reused(node: Node) -> NodeOutcome:
    return outcome_of(node, "reused", metrics=record_of(node).metrics)


@dataclass(frozen=True)
class RunResult:
    """What became of a run. `selected` is the model that the last `select` stage chose: node, path and metrics."""

    pipeline: str
    status: Literal["done", "failed", "interrupted", "unfinished"]
    nodes: tuple[NodeOutcome, ...]
    tracking: Mapping[str, str | None]
    selected: Mapping[str, Any] | None
    log: Path | None = None
    untracked: int = 0
    """Events that the tracking server has not got yet; `heliostat sync` delivers them."""


class View(Protocol):
    """Who watches a run. Called from several threads; returns at once."""

    def began(self, plan: Plan, *, log: Path | None) -> None: ...
    def note(self, text: str) -> None: ...
    def started(self, node: Node) -> None: ...
    def progress(self, node: Node, fields: Mapping[str, Any]) -> None: ...
    def warned(self, node: Node, text: str) -> None: ...
    def made(self, node: Node, metrics: Mapping[str, float]) -> None: ...
    def ended(self, outcome: NodeOutcome) -> None: ...


class Unwatched:
    """A view that shows nothing."""

    def began(self, plan: Plan, *, log: Path | None) -> None: ...
    def note(self, text: str) -> None: ...
    def started(self, node: Node) -> None: ...
    def progress(self, node: Node, fields: Mapping[str, Any]) -> None: ...
    def warned(self, node: Node, text: str) -> None: ...
    def made(self, node: Node, metrics: Mapping[str, float]) -> None: ...
    def ended(self, outcome: NodeOutcome) -> None: ...
