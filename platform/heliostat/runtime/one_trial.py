"""One trial of a search run again: the thread that trained it, in a worker of its own, without Tune or a journal."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from heliostat.core.objective import Objectives
from heliostat.errors import StageError
from heliostat.runtime.failures import kind_of_failure
from heliostat.runtime.hang import why_it_hung
from heliostat.runtime.journal import Ended, Reported, Row, Standing, Status, Suggested, TrialRecord
from heliostat.runtime.tasks import run_task
from heliostat.runtime.trial_actor import TrialRun, TrialWork
from heliostat.training.phases import TIMES


@dataclass(frozen=True)
class Rerun:
    """A trial of the search `node` as it ended there, and as it ends now."""

    node: str
    then: TrialRecord
    now: TrialRecord
    changed: tuple[str, ...] = ()
    """What else is not as it was, such as the versions of libraries."""

    @property
    def differences(self) -> list[tuple[str, float | None, float | None, float | None]]:
        """Metric, then, now and difference of each one's best epoch; None where there is none. Times are left out."""
        names = [name for name in {**self.then.metrics, **self.now.metrics} if not _is_time(name)]
        pairs = [(name, self.then.metrics.get(name), self.now.metrics.get(name)) for name in names]
        return [(name, then, now, None if then is None or now is None else now - then) for name, then, now in pairs]

    @property
    def identical(self) -> bool:
        """Whether each metric of each epoch is the same to the last bit, and the end too: done, or that failure."""
        return _what_happened(self.then) == _what_happened(self.now)


def _is_time(name: str) -> bool:
    return name in TIMES or name.endswith("_per_s") or name == "latency_ms"


def _what_happened(trial: TrialRecord) -> str:
    history = [
        (epoch, [(name, row[name]) for name in sorted(row) if not _is_time(name)]) for epoch, row in trial.history
    ]
    failure = kind_of_failure(trial.reason) if trial.reason and trial.status == "failed" else None
    return repr((history, failure))  # in which what is not a number equals itself


def run_again(work: TrialWork, then: TrialRecord, *, seed: int, objectives: Objectives) -> TrialRecord:
    """Train with the trial's parameters and seed; to the epoch at which it was stopped, if it was.

    A process that dies is started again as often as in the search.
    """
    resources = work.resources
    alone = resources.workers_per_trial == 1  # the driver of several workers only waits for them
    stop_at = then.epochs if then.status == "stopped" else None
    if work.appraisal is not None:  # at the same epochs as then
        work = replace(work, rungs=tuple(epoch for epoch, row in then.history if work.metric in row))
    started = time.monotonic()
    rows: list[Row] = []
    try:
        rows, status, reason = run_task(
            _train,
            work,
            then.id,
            dict(then.params),
            seed,
            stop_at,
            root=work.root,
            held=resources.per_worker if alone else {"CPU": 0},
            retries=work.retries,
        )
    except StageError as error:  # its process died: what the user's code raises comes back as a reason
        hung = why_it_hung(resources.hang_timeout_s, note=work.hang_note(then.id))
        status, reason = "failed", hung or str(error)
    standing = Standing()
    ended = Ended(then.id, status, reason, time.monotonic() - started)
    for event in (Suggested(then.id, then.params), Reported(then.id, rows), ended):
        standing.apply(event, objectives)
    return standing.ended[then.id]


def _train(
    work: TrialWork, trial: str, params: Mapping[str, Any], seed: int, stop_at: int | None
) -> tuple[list[Row], Status, str | None]:
    run = TrialRun(work, trial, params, seed, stop_at=stop_at)
    rows: list[Row] = []
    while True:
        answer = run.answer()
        rows += answer["rows"]
        if "outcome" in answer:
            ended_early = stop_at is not None and answer["outcome"] == "done"
            return rows, "stopped" if ended_early else answer["outcome"], answer["reason"]
