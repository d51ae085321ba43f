"""Where the events of a search pass through: it leads the engine, tells the reporter and writes the journal.

The reporter is told before the journal: what the journal has is not told again, while telling a thing a second time
changes nothing. The trials of earlier searches teach the engine first, and have no other part. A ledger that is opened
on a journal with events in it leads its fresh engine through them. It is then where the interrupted search was: ended
trials stay ended, and those under way come first in `next`.
"""

import hashlib
import json
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from heliostat.core.objective import Bound, Objectives
from heliostat.core.stage import Reporter
from heliostat.errors import StageError
from heliostat.runtime.engines import Engine
from heliostat.runtime.journal import (
    Ended,
    Event,
    Journal,
    Judged,
    Reported,
    Restarted,
    Row,
    Standing,
    Status,
    Suggested,
    TrialRecord,
)

Cause = Literal["trials", "wall time", "target", "the task fails"]
"""What a search ended by."""


@dataclass(frozen=True)
class Budget:
    """What ends a search, whichever comes first. What runs then ends at once, with the epochs that it has."""

    trials: int
    wall_time_s: float | None = None
    """Interruptions do not count."""
    target: Sequence[Bound] = ()
    """What has to be kept to in one epoch of one trial, all of it."""

    def is_met_by(self, row: Mapping[str, float]) -> bool:
        return bool(self.target) and all(bound.metric in row and bound.excess(row) <= 0 for bound in self.target)


class Ledger:
    """Used by one thread. `standing` is what the events so far amount to."""

    def __init__(
        self,
        engine: Engine,
        journal: Journal,
        reporter: Reporter,
        *,
        budget: Budget,
        seed: int,
        objectives: Objectives,
        start_from: Sequence[Mapping[str, Any]] = (),
        earlier: Sequence[TrialRecord] = (),
    ) -> None:
        self.standing = Standing()
        self._engine, self._journal, self._reporter = engine, journal, reporter
        self._budget, self._seed, self._objectives = budget, seed, objectives
        self._first = deque(start_from)
        self._on_target: set[str] = set()
        self._states = Counter[Status]()
        self._best: str | None = None
        self.failure: tuple[str, str] | None = None
        """The trial that found out that the task fails whatever the parameters are, and the reason."""
        self._started_at: dict[str, float] = {}
        self._told: set[str] = set()
        """The trials that the reporter knows of, in this attempt."""
        for number, trial in enumerate(earlier, 1):
            engine.adopt(f"earlier-{number}", trial.params)
            engine.observe(f"earlier-{number}", objectives.costs(trial.metrics))
        for event in journal.past:
            self._replay(event)
        self._again = deque(self.standing.open)

    def _replay(self, event: Event) -> None:
        self._apply(event)
        if isinstance(event, Suggested):
            suggested = self._suggest(event.id)
            if suggested is None or _compared(suggested) != _compared(event.params):
                raise StageError(
                    f"{self._journal.path} is not of this search: trial {event.id} has {event.params}, not {suggested}"
                )
        elif isinstance(event, Ended):
            self._learn(event.id)

    def _suggest(self, trial: str) -> Mapping[str, Any] | None:
        """What it starts from comes first, and then what the engine says."""
        if not self._first:
            return self._engine.suggest(trial)
        point = self._first.popleft()
        self._engine.adopt(trial, point)
        return point

    def _learn(self, trial: str) -> None:
        """What an ended trial teaches: the engine, and whoever watches."""
        ended = self.standing.ended
        self._states[ended[trial].status] += 1
        if not ended[trial].was_judged:
            self._engine.observe(trial, None)
        else:
            self._engine.observe(trial, self._objectives.costs(ended[trial].metrics))
            rivals = [self._best, trial] if self._best else [trial]
            self._best = self._objectives.best({rival: ended[rival].metrics for rival in rivals})

    def _apply(self, event: Event) -> None:
        self.standing.apply(event, self._objectives)
        match event:
            case Reported(trial, rows) if any(self._budget.is_met_by(row) for _, row in rows):
                self._on_target.add(trial)
            case Restarted(trial) | Ended(trial, "failed"):
                self._on_target.discard(trial)

    def _record(self, event: Event) -> None:
        self._apply(event)
        self._tell(event)
        self._journal.append(event)

    def _tell(self, event: Event) -> None:
        match event:
            case Restarted(trial):
                self._told.discard(trial)
            case Reported(trial, rows):
                self._tell_of(trial, self.standing.open[trial])
                for epoch, row in rows:
                    self._reporter.metrics(row, step=epoch, trial=trial)
            case Ended(trial, status, reason, seconds):
                record = self.standing.ended[trial]
                self._tell_of(trial, record)
                self._reporter.trial_ended(
                    trial,
                    status,
                    metrics=record.metrics,
                    best_epoch=record.best_epoch,
                    seconds=seconds,
                    reason=reason,
                )

    def _tell_of(self, trial: str, record: TrialRecord) -> None:
        if trial not in self._told:
            self._told.add(trial)
            self._reporter.began()
            self._reporter.trial_started(trial, record.params)

    @property
    def left(self) -> int:
        """How many trials are still to be run, those to be run again included."""
        return self._budget.trials - len(self.standing.ended)

    @property
    def over(self) -> Cause | None:
        """What the search has ended by; None while it goes on."""
        if self.failure is not None:
            return "the task fails"
        if self._on_target:
            return "target"
        if self.left == 0:
            return "trials"
        limit = self._budget.wall_time_s
        return "wall time" if limit is not None and self._journal.spent_s >= limit else None

    def next(self) -> dict[str, Any] | None:
        """What a trial actor needs to run the next trial; None when there is none."""
        if self.over:
            return None
        if self._again:
            trial = self._again.popleft()
            self._record(Restarted(trial))
        else:
            trial = f"{len(self.standing.ended) + len(self.standing.open) + 1:04d}"
            suggested = self._suggest(trial)
            if suggested is None:
                return None
            self._record(Suggested(trial, suggested))
        self._started_at[trial] = time.monotonic()
        self._show_progress()
        params = json.dumps(self.standing.open[trial].params)
        is_first = not self.standing.ended
        return {"trial": trial, "params": params, "seed": trial_seed(self._seed, trial), "is_first": is_first}

    def began(self, trial: str) -> None:
        """The trial's process is there and works: what it waited for does not count as its time."""
        self._started_at[trial] = time.monotonic()
        self._tell_of(trial, self.standing.open[trial])

    def restarted(self, trial: str, *, why: str) -> None:
        """The trial's process died, and another begins it anew."""
        first_line, _, _ = why.partition("\n")
        self.warned(trial, f"{first_line}; it begins anew")
        self._record(Restarted(trial))

    def warned(self, trial: str, text: str) -> None:
        self._reporter.warn(f"trial {trial}: {text}")

    def rows(self, trial: str, rows: Sequence[Row]) -> None:
        if rows:
            self._record(Reported(trial, rows))

    def judged(self, verdict: Judged) -> None:
        self._record(verdict)

    def task_failed(self, trial: str, reason: str) -> None:
        """A trial found out that the task fails at every point. That ends the search, unless another trial works.

        The journal does not tell of it: once the task is repaired, the trials that were under way begin anew.
        """
        open_trials = self.standing.open.values()
        works = any(self._objectives.figures(row for _, row in record.history) for record in open_trials)
        if self.failure is None and not works and not any(t.was_judged for t in self.standing.ended.values()):
            self.failure = (trial, reason)

    def ended(self, trial: str, status: Status, reason: str | None) -> None:
        """A trial came to its end. One that never reported all that it is judged by has failed, if it had its time."""
        if self.failure is not None:
            self._reporter.trial_ended(trial, status, metrics={}, reason=reason or "the search ended: the task fails")
            return
        rows = [row for _, row in self.standing.open[trial].history]
        if status != "failed" and not self._objectives.figures(rows):
            reported = ", ".join(sorted({metric for row in rows for metric in row}))
            wanted = " and ".join(self._objectives.metrics)
            if status == "stopped" and self.over:
                reason = f"the search ended before an epoch of it reported {wanted}"
            else:
                status, reason = "failed", f"no epoch reports {wanted}; what is reported: {reported or 'nothing'}"
        if status == "stopped" and reason is None:
            reason = self._why_stopped(self.standing.open[trial])
        now = time.monotonic()
        self._record(Ended(trial, status, reason, now - self._started_at.pop(trial, now)))
        self._learn(trial)
        self._show_progress()

    def _why_stopped(self, trial: TrialRecord) -> str | None:
        verdict = trial.verdicts[-1] if trial.verdicts else None
        if verdict and verdict.stopped:
            cut = "" if verdict.cut is None else f", the cut is {verdict.cut:.4g}"
            metric = self._objectives.first.metric
            return f"stopped by the scheduler after epoch {verdict.epoch}: {metric} {verdict.value:.4g}{cut}"
        return None

    def end_open(self) -> None:
        """End the trials that are under way when the search is over."""
        for trial in list(self.standing.open):
            self.ended(trial, "stopped", None)

    def _show_progress(self) -> None:
        ended, first = self.standing.ended, self._objectives.first.metric
        self._reporter.progress(
            done=len(ended),
            total=self._budget.trials,
            running=len(self._started_at),
            stopped=self._states["stopped"],
            failed=self._states["failed"],
            best=ended[self._best].metrics[first] if self._best else None,
        )


def trial_seed(seed: int, trial: str) -> int:
    """The seed of one trial: the same whenever and wherever it runs."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{trial}".encode()).digest()[:4]) >> 1


def _compared(point: Mapping[str, Any]) -> str:
    """A point as text, in which 16.0 is 16: journals of before have the former for whole steps."""

    def number(text: str) -> float:
        value = float(text)
        return int(value) if value.is_integer() else value

    return json.dumps(json.loads(json.dumps(point), parse_float=number))
