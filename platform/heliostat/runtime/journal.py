"""The truth of a search: one append-only file of what was suggested, reported and concluded.

Each line is one JSON object, written before what it tells of takes effect (a suggestion before its trial runs, an end
before the next suggestion). A process may die at any byte: what follows the last complete line is cut off when the file
is opened again. Each line also says how long the search had been running by then, interruptions left out. Whoever reads
the lines in order through a fresh searcher has that searcher's state.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from heliostat.core.integrity import check_names
from heliostat.core.objective import Objectives

Status = Literal["done", "stopped", "failed"]
Row = tuple[int, dict[str, float]]
"""An epoch, counted from 1, and its metrics."""

SYNC_S = 1.0
"""At most so many seconds of trials are lost when the machine itself (not just the process) goes down."""


@dataclass(frozen=True)
class TrialRecord:
    """One trial that came to an end."""

    id: str
    params: Mapping[str, Any]
    status: Status
    metrics: Mapping[str, float]
    """Those of the epoch with the best first objective; of a failed trial, what it reported up to then."""
    epochs: int
    reason: str | None
    seconds: float
    history: Sequence[Row] = field(default=(), repr=False)
    verdicts: Sequence["Judged"] = field(default=(), repr=False)
    """One for each epoch after which a scheduler compared it."""

    @property
    def best_epoch(self) -> int:
        """The epoch that `metrics` are of; 0 if there is none."""
        return next((epoch for epoch, row in self.history if row == self.metrics), 0)

    @property
    def was_judged(self) -> bool:
        """Whether it can be compared with others: it neither failed nor was stopped before it had its figures."""
        return self.status != "failed" and bool(self.metrics)


@dataclass(frozen=True)
class Suggested:
    id: str
    params: Mapping[str, Any]


@dataclass(frozen=True)
class Reported:
    id: str
    rows: Sequence[Row]


@dataclass(frozen=True)
class Judged:
    """A scheduler held `value` against `cut`, and the trial went on or was stopped. Without a cut it goes on."""

    id: str
    epoch: int
    value: float
    cut: float | None
    stopped: bool


@dataclass(frozen=True)
class Restarted:
    """A trial begins anew, with its parameters: its process died, or the search was cut off while it was under way."""

    id: str


@dataclass(frozen=True)
class Ended:
    id: str
    status: Status
    reason: str | None
    seconds: float


Event = Suggested | Reported | Judged | Restarted | Ended
_KINDS: dict[str, type[Any]] = {kind.__name__.lower(): kind for kind in (Suggested, Reported, Judged, Restarted, Ended)}


class Journal:
    """The file, open for appending. `past` holds the events that were in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "a+b")  # noqa: SIM115 - stays open
        self._spent_before_s = 0.0
        self.past = self._read()
        self._opened_at = self._synced_at = time.monotonic()

    def _read(self) -> list[Event]:
        self._file.seek(0)
        complete = _complete_part(self._file.read())
        self._file.truncate(len(complete))
        lines = [json.loads(line) for line in complete.splitlines()]
        if lines:
            self._spent_before_s = lines[-1].get("spent_s", 0.0)
        return [_decode(line) for line in lines]

    @property
    def spent_s(self) -> float:
        """How long the search has been running, up to each interruption as far as the journal tells."""
        return self._spent_before_s + time.monotonic() - self._opened_at

    def append(self, event: Event) -> None:
        line = {"event": type(event).__name__.lower(), **vars(event), "spent_s": round(self.spent_s, 3)}
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        if time.monotonic() - self._synced_at > SYNC_S:
            self._sync()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced_at = time.monotonic()

    def close(self) -> None:
        self._sync()
        self._file.close()


def read_events(path: Path) -> list[Event]:
    """What is in a journal, which may be another process's to write: the file stays as it is."""
    return [_decode(json.loads(line)) for line in _complete_part(path.read_bytes()).splitlines()]


def _complete_part(content: bytes) -> bytes:
    return content[: content.rfind(b"\n") + 1]


def _decode(line: dict[str, Any]) -> Event:
    fields = {name: value for name, value in line.items() if name not in ("event", "spent_s")}
    kind = _KINDS[line["event"]]
    check_names([fields["id"]], place="a journal, trial")
    if kind is Reported:
        fields["rows"] = [(epoch, metrics) for epoch, metrics in fields["rows"]]
    event: Event = kind(**fields)
    return event


@dataclass(frozen=True)
class Standing:
    """What a sequence of events amounts to."""

    ended: dict[str, TrialRecord] = field(default_factory=dict)
    open: dict[str, TrialRecord] = field(default_factory=dict)
    """Suggested and not ended; the status of these records means nothing."""

    def apply(self, event: Event, objectives: Objectives) -> None:
        match event:
            case Suggested(id, params):
                self.open[id] = TrialRecord(id, params, "failed", {}, 0, None, 0.0, [], [])
            case Restarted(id):
                self.open[id] = replace(self.open[id], history=[], verdicts=[])
            case Judged(id):
                self.open[id] = replace(self.open[id], verdicts=[*self.open[id].verdicts, event])
            case Reported(id, rows):
                self.open[id] = replace(self.open[id], history=[*self.open[id].history, *rows])
            case Ended(id, status, reason, seconds):
                trial = self.open.pop(id)
                self.ended[id] = replace(
                    trial,
                    status=status,
                    reason=reason,
                    seconds=seconds,
                    epochs=trial.history[-1][0] if trial.history else 0,
                    metrics=objectives.figures(row for _, row in trial.history),
                )
