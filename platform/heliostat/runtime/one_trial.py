"""One trial of a search run again: the thread that did its work, in a worker of its own, without Tune or a journal."""

import time
from dataclasses import dataclass, replace

from heliostat.core.objective import Objectives
from heliostat.errors import StageError
from heliostat.runtime.failures import kind_of_failure
from heliostat.runtime.hang import why_it_hung
from heliostat.runtime.journal import Ended, Reported, Row, Standing, Status, Suggested, TrialRecord
from heliostat.runtime.ledger import trial_seed
from heliostat.runtime.tasks import run_task
from heliostat.runtime.trial_actor import TrialRun
from heliostat.runtime.work import Conditions, Trial, Work
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


def run_again(work: Work, conditions: Conditions, then: TrialRecord, *, objectives: Objectives) -> TrialRecord:
    """Do the trial's work with its parameters and seed; to the epoch at which it was stopped, if it was.

    A process that dies is started again as often as in the search.
    """
    resources = conditions.resources
    alone = resources.workers_per_trial == 1  # the driver of several workers only waits for them
    trial = Trial(then.id, dict(then.params), trial_seed(conditions.seed, then.id))
    stop_at = then.epochs if then.status == "stopped" else None
    judged_at = tuple(epoch for epoch, row in then.history if conditions.metric in row)  # be it now as it was then
    started = time.monotonic()
    rows: list[Row] = []
    try:
        rows, status, reason = run_task(
            _do,
            work,
            replace(conditions, compared_at=judged_at),
            trial,
            stop_at,
            root=conditions.root,
            held=resources.per_worker if alone else {"CPU": 0},
            retries=conditions.retries,
        )
    except StageError as error:  # its process died: what the user's code raises comes back as a reason
        hung = why_it_hung(resources.hang_timeout_s, note=conditions.hang_note(then.id))
        status, reason = "failed", hung or str(error)
    standing = Standing()
    ended = Ended(then.id, status, reason, time.monotonic() - started)
    for event in (Suggested(then.id, then.params), Reported(then.id, rows), ended):
        standing.apply(event, objectives)
    return standing.ended[then.id]


def _do(work: Work, conditions: Conditions, trial: Trial, stop_at: int | None) -> tuple[list[Row], Status, str | None]:
    run = TrialRun(work, conditions, trial, stop_at=stop_at)
    rows: list[Row] = []
    while True:
        answer = run.answer()
        rows += answer["rows"]
        if "outcome" in answer:
            ended_early = stop_at is not None and answer["outcome"] == "done"
            return rows, "stopped" if ended_early else answer["outcome"], answer["reason"]
