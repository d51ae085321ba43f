"""One trial of a search run again, by what the search's journal says of it."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from heliostat.core.objective import Objectives
from heliostat.core.stage import StageContext
from heliostat.errors import SpecError, nearest
from heliostat.stages import compress
from heliostat.stages.tune import objectives_of, work_of
from heliostat.stages.tune_config import TuneConfig

if TYPE_CHECKING:
    from heliostat.runtime.journal import TrialRecord
    from heliostat.runtime.one_trial import Rerun
    from heliostat.runtime.work import Work

SearchConfig = TuneConfig | compress.CompressConfig
"""Of the stages whose trials can be run again."""


def ended_trial(context: StageContext, config: SearchConfig, trial: str) -> "TrialRecord":
    """How the trial of the stage's search ended. Raises SpecError when there is none, or nothing of it."""
    from heliostat.runtime.journal import Standing, read_events

    objectives, _ = _trials_of(context, config)
    standing = Standing()
    for event in read_events(context.folder / "journal.jsonl"):
        standing.apply(event, objectives)
    if trial not in standing.ended:
        state = "has not ended yet" if trial in standing.open else "does not exist"
        raise SpecError(f"--trial: {trial!r} {state}{nearest(trial, standing.ended)}")
    ended = standing.ended[trial]
    if ended.status == "stopped" and ended.epochs == 0:
        raise SpecError(f"--trial: {trial!r} was stopped before its first epoch had ended: nothing to repeat")
    return ended


def _trials_of(context: StageContext, config: SearchConfig) -> tuple[Objectives, "Work"]:
    """What the trials of a search are compared by, and what they do."""
    if isinstance(config, TuneConfig):
        return objectives_of(config, context.task.metric_modes), work_of(context, config)
    return compress.objectives_of(context, config), compress.work_of(context, config)


def rerun(context: StageContext, config: SearchConfig, then: "TrialRecord") -> "Rerun":
    """Do what a trial did in its search again, from its parameters and its seed, and set one beside the other.

    `context.folder` is the search's own, which stays as it is. Raises ResourceError where the trial cannot fit.
    """
    from heliostat.runtime.one_trial import Rerun, run_again
    from heliostat.runtime.shared_data import shared_data
    from heliostat.runtime.trials import concurrent_trials
    from heliostat.runtime.work import Conditions

    concurrent_trials(context.resources)
    where_all_machines_see_it = context.folder.parent
    with tempfile.TemporaryDirectory(prefix=".rerun-", dir=where_all_machines_see_it) as scratch:
        aside = replace(context, folder=Path(scratch, "node"))
        for empty in (aside.folder, aside.shelf):
            empty.mkdir(parents=True)
        objectives, work = _trials_of(aside, config)
        with shared_data(aside, folder=aside.folder) as provider:
            if provider:
                provider.provide(work.data_args(then.params))
            shared = provider.shared if provider else None
            conditions = Conditions.of(aside, metric=objectives.first.metric, shared=shared)
            now = run_again(work, conditions, then, objectives=objectives)
    return Rerun(context.node, then, now)
