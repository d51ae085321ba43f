"""Search: many trials, of which each does a small piece of the same kind of work.

    engine (what to try next)  ->  Tune (where and when)  ->  trial actors (the work)
                 ^                                                     |
                 +------------ ledger: journal + reporter <------------+

Tune keeps nothing that matters. A search resumes by leading a fresh engine and scheduler through the journal: trials
that ended are not run again, and those under way begin anew, first, under the same ids and parameters.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from heliostat.core.objective import Objectives
from heliostat.core.space import Space
from heliostat.core.stage import StageContext
from heliostat.errors import StageError
from heliostat.runtime.engines import engines
from heliostat.runtime.failures import Failures, commonest, grouped, told
from heliostat.runtime.journal import Journal, TrialRecord
from heliostat.runtime.ledger import Budget, Cause, Ledger
from heliostat.runtime.shared_data import DataProvider, shared_data
from heliostat.runtime.task_failure import other_points, told_of_task
from heliostat.runtime.work import Conditions, Work

if TYPE_CHECKING:
    from heliostat.runtime.scheduling import Rung, Settings


@dataclass(frozen=True)
class Search:
    """What is looked for, where, and how."""

    space: Space
    algorithm: str
    """The name of an engine."""
    budget: Budget
    objectives: Objectives
    scheduler: "Settings | None" = None
    start_from: Sequence[Mapping[str, Any]] = ()
    """Points that are tried first."""
    earlier: Sequence[TrialRecord] = ()
    """Trials of other searches, which the engine learns from."""


@dataclass(frozen=True)
class SearchOutcome:
    """What a search found out."""

    trials: tuple[TrialRecord, ...]
    """Every trial, in the order in which they were suggested."""
    best: TrialRecord
    """By the first objective, of equals in that by the next; within the limits."""
    front: tuple[TrialRecord, ...]
    """Those that no other is better than in one objective and as good as in all: the Pareto set, `best` among them."""
    ended_by: Cause
    rungs: tuple["Rung", ...] = ()
    """Each epoch after which trials were compared, and the last one; empty without a scheduler."""
    failures: tuple[Failures, ...] = ()
    """By kind, the commonest first."""

    @property
    def failure_details(self) -> dict[str, Any]:
        """What a record keeps of them: a row for each kind."""
        rows = [{"failed": f.count, "first": f.first, "reason": f.line} for f in self.failures]
        return {"failures": rows} if rows else {}


def run_search(context: StageContext, search: Search, work: Work) -> SearchOutcome:
    """The best of the trials that the budget allows, each of which does the `work` with parameters from the space.

    The stage's folder holds `journal.jsonl`; a search that was cut off goes on from there. With one trial at a time it
    then makes the suggestions that it would have made uninterrupted. A trial begins anew as often as `context.retries`
    says after its process died; what the user's code raises is that trial's end. Raises StageError when no trial
    succeeds within the limits, ResourceError when none can ever fit, KeyboardInterrupt when the stage is cancelled; the
    journal is intact then.
    """
    with shared_data(context, folder=context.folder) as provider:
        if provider and not any(path.startswith("data_args.") for path in search.space.paths()):
            provider.provide(work.data_args({}))  # at once: it is built while this process imports Ray Tune
        return _run(context, search, work, provider)


def _run(context: StageContext, search: Search, work: Work, provider: DataProvider | None) -> SearchOutcome:
    from heliostat.runtime.scheduling import make_scheduler, rung_table
    from heliostat.runtime.trials import concurrent_trials, run_trials

    objectives, budget, first = search.objectives, search.budget, search.objectives.first
    concurrent = concurrent_trials(context.resources)
    engine = engines()[search.algorithm].make(
        search.space, num_objectives=len(objectives.ordered), seed=context.seed, trials=budget.trials
    )
    engine = work.engine(engine, search.space, seed=context.seed)
    judge = make_scheduler(search.scheduler, epochs=work.epochs, mode=first.mode) if search.scheduler else None
    compared_at = judge.compared_at if judge else ()
    journal = Journal(context.folder / "journal.jsonl")
    try:
        ledger = Ledger(
            engine,
            journal,
            context.reporter,
            budget=budget,
            seed=context.seed,
            objectives=objectives,
            start_from=search.start_from,
            earlier=search.earlier,
        )
        points = other_points(search.space, seed=context.seed)
        if not ledger.over:
            if judge:
                judge.remember(ledger.standing.ended.values(), metric=first.metric)
            shared = provider.shared if provider else None
            conditions = Conditions.of(
                context,
                metric=first.metric,
                compared_at=compared_at,
                shared=shared,
                other_points=points,
            )
            assert context.cancel is not None
            run_trials(
                work,
                conditions,
                ledger,
                judge=judge,
                provider=provider,
                concurrent=min(concurrent, ledger.left),
                cancel=context.cancel,
            )
        if ledger.failure is not None:
            trial, reason = ledger.failure
            raise StageError(told_of_task(reason, trial=trial, points=points))
        ended_by = ledger.over or "trials"  # a grid may have fewer points than there were trials to spend
        ledger.end_open()
    finally:
        journal.close()
    trials = sorted(ledger.standing.ended.values(), key=lambda trial: trial.id)
    failures = grouped({trial.id: trial.reason or "" for trial in trials if trial.status == "failed"})
    if failures and len(trials) > sum(group.count for group in failures):  # else the error says all of it
        context.reporter.warn(told(failures, of=len(trials)))
    best, front = _choose(trials, objectives)
    table = rung_table(trials, epochs=(*compared_at, work.epochs)) if judge else ()
    return SearchOutcome(tuple(trials), best, front, ended_by, tuple(table), tuple(failures))


def _choose(trials: Sequence[TrialRecord], objectives: Objectives) -> tuple[TrialRecord, tuple[TrialRecord, ...]]:
    """The best of the trials, and the front. Raises StageError when none was judged, or is within the limits."""
    by_id = {trial.id: trial for trial in trials}
    good = {trial.id: trial.metrics for trial in trials if trial.was_judged}
    if not good:
        how = "failed" if all(trial.status == "failed" for trial in trials) else "failed or were stopped unjudged"
        raise StageError(f"all {len(trials)} trials {how}\n{commonest(trial.reason or '' for trial in trials)}")
    best = objectives.best(good)
    if best is None:
        closest = by_id[objectives.closest(good)]
        figures = ", ".join(f"{limit.metric} {closest.metrics[limit.metric]:.4g}" for limit in objectives.limits)
        raise StageError(
            f"none of {len(good)} trials is within the limits: {', '.join(map(str, objectives.limits))}; "
            f"the closest is {closest.id}, with {figures}: {json.dumps(closest.params)}"
        )
    return by_id[best], tuple(by_id[trial] for trial in objectives.front(good))
