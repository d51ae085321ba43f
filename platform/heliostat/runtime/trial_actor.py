"""The process that runs trials one after another, each in a thread of its own.

Tune asks for a result and waits. An answer comes when the trial reaches a rung (the thread then waits for the verdict),
when it ends, and else about once a second with the rows so far, so that a driver can show them. One answer carries
many rows: a round trip through Tune costs more than a small epoch.

A trial that fails answers with its traceback and leaves the process as it is, for the next one.
"""

import json
import math
import threading
from collections.abc import Mapping
from typing import Any

from ray import tune

from heliostat.core.imports import use_root
from heliostat.errors import HeliostatError
from heliostat.runtime.hang import waiting
from heliostat.runtime.journal import Row
from heliostat.runtime.task_failure import fails_everywhere, why_it_failed
from heliostat.runtime.work import Conditions, Trial, Work

ANSWER_S = 1.0


class BadTrialError(HeliostatError):
    """A trial whose objective is not a number, or that never reported it."""


class _StoppedError(Exception):
    """Unwinds a training loop that goes on although it was told to stop."""


class TrialRun:
    """One trial: the thread that works, and the conversation with it."""

    def __init__(
        self,
        work: Work,
        conditions: Conditions,
        trial: Trial,
        *,
        stop_at: int | None = None,
        is_first: bool = False,
    ) -> None:
        """With `stop_at` it ends after that epoch, however many there are. No trial has ended before one `is_first`."""
        self._work, self._conditions, self._stop_at, self._is_first = work, conditions, stop_at, is_first
        self._turn = threading.Condition()
        self._rows: list[Row] = []
        self._warnings: list[str] = []
        self._last: tuple[int, float] | None = None
        """The latest epoch and the objective there."""
        self._at_rung = False
        """The thread waits for a verdict."""
        self._told = False
        """The last answer said so: being asked again is the verdict to go on."""
        self._stopping = self._over = False
        self._reason: str | None = None
        self._of_task = False
        """The task fails, whatever the parameters are."""
        self._thread = threading.Thread(target=self._do, args=(trial,), name=f"trial-{trial.id}", daemon=True)
        self._thread.start()

    def answer(self) -> dict[str, Any]:
        """The next result for Tune. Asking again after a rung is the verdict to go on."""
        with self._turn:
            if self._told:
                self._at_rung = False
                self._turn.notify_all()
            self._turn.wait_for(lambda: self._over or self._at_rung, timeout=ANSWER_S)
            result: dict[str, Any] = {"rows": self._rows, "warnings": self._warnings}
            if self._over:
                outcome = "failed" if self._reason else "done"
                result |= {"done": True, "outcome": outcome, "reason": self._reason, "of_task": self._of_task}
            if self._last and not self._reason and (self._over or self._at_rung):
                result |= {"epoch": self._last[0], "value": self._last[1]}
            self._rows, self._warnings, self._told = [], [], self._at_rung
            return result

    def stop(self, *, wait: bool) -> None:
        """End the trial at its current epoch. With `wait`, return when nothing of it runs any more."""
        with self._turn:
            self._stopping, self._at_rung = True, False
            self._turn.notify_all()
        if wait:
            self._thread.join()

    def _on_epoch(self, epoch: int, metrics: Mapping[str, float]) -> bool:
        with waiting(), self._turn:  # for the verdict
            if self._stopping:
                raise _StoppedError
            self._rows.append((epoch, dict(metrics)))
            value = self._value(metrics, epoch=epoch)
            if value is not None:
                self._last = (epoch, value)
            if epoch in self._conditions.compared_at and epoch < self._work.epochs:
                self._at_rung = True
                self._turn.notify_all()
                self._turn.wait_for(lambda: not self._at_rung)
            self._stopping |= epoch == self._stop_at
            return self._stopping

    def _value(self, metrics: Mapping[str, float], *, epoch: int = 1) -> float | None:
        """What the trial is compared by; None where an epoch need not have it. Raises BadTrialError for a bad row."""
        metric = self._conditions.metric
        value = metrics.get(metric)
        if value is None and self._work.judged_each_epoch:
            raise BadTrialError(f"nothing reports {metric!r}; what is reported: {', '.join(sorted(metrics))}")
        if value is not None and math.isnan(value):
            raise BadTrialError(f"{metric} is not a number at epoch {epoch}")
        return value

    def _warn(self, text: str) -> None:
        with self._turn:
            self._warnings.append(text)

    def _do(self, trial: Trial) -> None:
        try:
            self._work.do(trial, self._conditions, on_epoch=self._on_epoch, warn=self._warn)
        except _StoppedError:
            pass
        except Exception as error:
            self._reason = why_it_failed(error, self._conditions)
        if self._reason and self._is_first and self._last is None:
            self._of_task = fails_everywhere(
                self._work,
                self._conditions,
                trial,
                self._reason,
                check=self._value,
                is_over=lambda: self._stopping,
            )
        with self._turn:
            self._over = True
            self._turn.notify_all()


class TrialActor(tune.Trainable):  # type: ignore[misc]
    """Tune's view of it. The first two are set on a subclass, which travels to the process once for all its trials."""

    work: Work
    conditions: Conditions
    _trial: dict[str, Any]
    _run: TrialRun | None = None

    def setup(self, config: dict[str, Any]) -> None:
        use_root(self.conditions.root)
        self._trial = config

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._end(wait=True)
        self._trial = new_config
        return True

    def step(self) -> dict[str, Any]:
        if self._run is None:  # not before: Tune does not retry a trial whose process dies while it is being set up
            given = self._trial
            trial = Trial(given["trial"], json.loads(given["params"]), given["seed"])
            self._run = TrialRun(self.work, self.conditions, trial, is_first=given["is_first"])
        return self._run.answer()

    def cleanup(self) -> None:
        """Workers beside this process end with it, if they can; what they still hold then, the search frees."""
        self._end(wait=self.conditions.resources.workers_per_trial > 1)

    def _end(self, *, wait: bool) -> None:
        if self._run is not None:
            self._run.stop(wait=wait)
            self._run = None
