"""`tune`: hyperparameter search through Ray Tune; the artifact is the best parameters and every trial."""

import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

from heliostat.core.artifact import Record
from heliostat.core.capacity import Need
from heliostat.core.imports import resolve, use_root
from heliostat.core.objective import Bound, Mode, Objective, Objectives
from heliostat.core.paths import overlay, why_not_a_path, without
from heliostat.core.points import numbers_at, point_near, why_apart
from heliostat.core.probes import probes
from heliostat.core.space import Space
from heliostat.core.spec import Resources
from heliostat.core.stage import ConfigView, StageContext, StageResult, stage
from heliostat.errors import SpecError, nearest
from heliostat.stages.checks import check_arguments, check_loop, check_metric, check_searched
from heliostat.stages.earlier import JOURNAL, SLOT, digest_of, lessons_in, lessons_of
from heliostat.stages.evaluate_after import appraisal_of, check_appraised, check_passes
from heliostat.stages.first_point import known_values
from heliostat.stages.trials_file import write_trials
from heliostat.stages.tune_config import (
    COSTS,
    TRIALS,
    AshaConfig,
    MedianConfig,
    ObjectiveConfig,
    SchedulerConfig,
    TuneConfig,
)
from heliostat.training.config import TrainConfig, explain_split

if TYPE_CHECKING:
    from heliostat.runtime.journal import TrialRecord
    from heliostat.runtime.scheduling import Settings
    from heliostat.runtime.work import Work

__all__ = ["TuneConfig", "tune"]


def _check(config: TuneConfig, view: ConfigView) -> Iterator[str]:
    space = Space.parse(config.space, "config.space")
    if not space.dimensions:
        yield "config.space: nothing to search; name at least one parameter"
    bad_paths = {path: why_not_a_path(TrainConfig, path) for path in space.paths()}
    for path, problem in bad_paths.items():
        if problem:
            yield f"config.space.{path}: not a field of the train config: {problem}"
    if not any(bad_paths.values()):
        for point in probes(space, random.Random(0)):
            overlay(config.train, point, place="config.space")
        wrong = list(check_searched(space.paths(), view, place="config.space"))
        yield from wrong or check_arguments(config.train, view, place="config.train", more=space.paths())
    workers = view.resources.workers_per_trial
    yield from check_loop(config.train, view, place="config.train", workers=workers)
    yield from _check_folds(config, view)
    if config.exhaustive:
        yield from _check_grid(config, space)
    yield from _check_start(config, space, view)
    yield from _check_teachers(config, space, view)
    yield from _check_objectives(config, view)
    yield from check_passes(config.evaluate_after, view)
    asking = ["config.evaluate_after"] if config.evaluate_after else []
    asking += config.costs.values() if view.task.train_fn is None else ()  # what an own loop reports, costs included
    for place in dict.fromkeys(asking):
        yield from check_appraised(place, view, folds=config.folds)
    for field in ("limits", "stop_when"):
        for metric in getattr(config, field):
            yield from check_metric(metric, view, place=f"config.{field}.{metric}", more=COSTS)


def _check_grid(config: TuneConfig, space: Space) -> Iterator[str]:
    size = space.size()
    if size is not None and size > config.max_grid:
        yield (
            f"config.space: a grid of {size:,} points is more than config.max_grid, {config.max_grid:,}; raise that "
            "if it is meant, or sample some of them with another algorithm"
        )
        return
    try:
        space.grid()
    except SpecError as error:
        yield f"config.space.{error}"
    if config.trials is not None and size not in (None, config.trials):
        yield f"config.trials: a grid runs each of its {size} points, not {config.trials}; leave it out"


def _check_start(config: TuneConfig, space: Space, view: ConfigView) -> Iterator[str]:

    known = [*space.paths(), TRIALS]
    for index, entry in enumerate(config.start_from):
        if TRIALS in entry and len(entry) > 1:
            yield f"config.start_from[{index}]: beside {TRIALS!r} stands nothing; what to try first is another entry"
    for place, point in config.points.items():
        strange = next((path for path in point if path not in known), None)
        if strange is not None:
            yield f"{place}.{strange}: not in the space{nearest(strange, known)}"
            continue
        try:
            numbers_at(space, point)
        except SpecError as error:
            yield f"{place}.{error}"
    for place, stated in config.earlier.items():
        if config.engine and not config.engine.learns:
            yield f"{place}: {config.algorithm} learns from no trials; what does: {_able_to_learn()}"
        try:
            lessons_of(stated, root=view.root, space=space, objectives=objectives_of(config, view.task.metric_modes))
        except SpecError as error:
            yield f"{place}: {error}"


def _check_teachers(config: TuneConfig, space: Space, view: ConfigView) -> Iterator[str]:
    from heliostat.runtime.engines import engines

    place, teachers = f"inputs.{SLOT}", view.inputs.get(SLOT, ())
    algorithm, _, why = config.method_when(taught=True)
    if teachers and not engines()[algorithm].learns:
        yield f"{place}: {algorithm} ({why}) learns from no trials; what does: {_able_to_learn()}"
    for kind, earlier in teachers:
        if not isinstance(earlier, TuneConfig):
            yield f"{place}: {kind.name!r} has no trials to learn from; name a stage that uses 'tune'"
        elif problem := why_apart(space, Space.parse(earlier.space)):
            yield f"{place}: no trial of that search can lie in the space of this one: {problem}"


def _able_to_learn() -> str:
    from heliostat.runtime.engines import engines

    return ", ".join(sorted(kind.name for kind in engines().values() if kind.learns))


def _identity(config: TuneConfig, view: ConfigView) -> Mapping[str, Any]:
    """Earlier trials count by what they are, and not by where they lie."""
    written = config.identity()
    for entry in written["start_from"]:
        if TRIALS in entry:
            entry[TRIALS] = digest_of(entry[TRIALS], root=view.root)
    return written


def _check_objectives(config: TuneConfig, view: ConfigView) -> Iterator[str]:
    from heliostat.runtime.engines import engines

    if config.objective and config.objectives:
        yield "config.objectives: there is config.objective already; leave one of them out"
    metrics = [aim.metric for aim in config.aims]
    for index, metric in enumerate(metrics):
        place = f"config.objectives[{index}]" if config.objectives else "config.objective"
        yield from check_metric(metric, view, place=f"{place}.metric", more=COSTS)
        if metric in metrics[:index]:
            yield f"{place}.metric: {metric!r} is there twice"
    if len(metrics) > 1 and config.engine and not config.engine.several:
        able = ", ".join(sorted(kind.name for kind in engines().values() if kind.several))
        yield f"config.algorithm: {config.algorithm} takes one objective, not {len(metrics)}; of several take {able}"


def _check_folds(config: TuneConfig, view: ConfigView) -> Iterator[str]:
    if config.folds is None:
        return
    if view.task.train_fn is not None:
        yield "config.folds: task.train_fn reads its data itself, so nobody can hold a part of it out; leave it out"
    if view.resources.workers_per_trial > 1:
        yield "config.folds: one worker trains the folds of a trial in turn; set resources.workers_per_trial to 1"


def _needs(resources: Resources) -> Need:
    return Need(resources.workers_per_trial, resources.per_worker)


def _workload(config: TuneConfig) -> dict[str, int]:
    _, trials, _ = config.method
    return {"trials": trials, "epochs": trials * config.epochs_per_trial}


def _explain(config: TuneConfig, view: ConfigView) -> Mapping[str, str]:
    teachers = len(view.inputs.get(SLOT, ()))
    algorithm, trials, reason = config.method_when(taught=teachers > 0)
    useless = _why_useless(config, view.resources, trials) if config.scheduler else None
    explained = {"algorithm": f"{algorithm}, {reason}"} | ({"scheduler": useless} if useless else {})
    if teachers:
        searches = "the search" if teachers == 1 else f"the {teachers} searches"
        explained[SLOT] = f"learns from the trials of {searches} before it, as far as they lie in its space"
    if _begins_with_known(config, taught=teachers > 0) and (point := _known_point(config, view.functions, seed=0)):
        known = known_values(Space.parse(config.space), config.train, view.functions)
        values = ", ".join(f"{path} {value}" for path, value in known.items() if point.get(path) == value)
        explained["first trial"] = f"what config.train comes to without a search: {values}"
    for place, stated in config.earlier.items():
        objectives = objectives_of(config, view.task.metric_modes)
        lessons = lessons_of(stated, root=view.root, space=Space.parse(config.space), objectives=objectives)
        explained[place.removeprefix("config.")] = f"learns from trials of an earlier search: {lessons}"
    workers = view.resources.workers_per_trial
    explained |= explain_split(config.train, workers=workers, task=view.task)
    if config.evaluate_after:
        passes = [step.chosen for step in config.evaluate_after]
        chain = ", then ".join(f"{uses} ({settings.method})" for uses, settings in passes)
        explained["evaluate_after"] = f"trials are compared by their models after {chain}, made anew each time"
    return explained


def _why_useless(config: TuneConfig, resources: Resources, trials: int) -> str | None:
    assert config.scheduler is not None
    name, options = config.scheduler.chosen
    grace, epochs = options.grace_epochs, config.train.epochs
    if grace >= epochs:
        return f"{name} saves nothing: no trial stops within {grace} epochs, and {epochs} are all there are"
    if isinstance(options, AshaConfig) and trials < options.reduction_factor:
        return f"{name} has nothing to choose from: it keeps one trial in {options.reduction_factor} of {trials}"
    if isinstance(options, MedianConfig) and trials <= options.min_trials:
        return f"{name} stops nothing: it compares a trial with {options.min_trials} others, and there are {trials - 1}"
    if trials <= _at_once_here(resources):
        return f"{name} saves little: all {trials} trials may run at once, so none waits for what another leaves"
    return None


def _at_once_here(resources: Resources) -> int:
    """How many trials this machine surely holds at once; what GPUs it has, or a cluster, a plan does not know."""
    needs = _needs(resources)
    fit = 0 if needs.of("GPU") else int((os.cpu_count() or 1) / needs.of("CPU"))
    return resources.max_concurrent_trials or fit


def _params_used(config: TuneConfig, inputs: Mapping[str, Sequence[Record]]) -> Mapping[str, Any]:
    """Of what is searched for there is no one value; each trial has its own."""
    searched = [f"train.{path}" for path in Space.parse(config.space).paths()]
    return reduce(without, searched, config.model_dump(mode="json"))


@stage(
    "tune",
    inputs={SLOT: "params*?"},
    output="params",
    place="driver",
    needs=_needs,
    workload=_workload,
    check=_check,
    identity=_identity,
    params_used=_params_used,
    explain=_explain,
    preload=lambda resources: ["heliostat.runtime.trials", "hyperopt"],
    works_apart=lambda resources: resources.workers_per_trial == 1,  # which leaves no files
)
def tune(context: StageContext, config: TuneConfig) -> StageResult:
    """Search. Each trial is one training of `config.train` with the parameters of the trial laid over it.

    The engine learns first from the trials of the searches that go in.
    """
    from heliostat.runtime.ledger import Budget
    from heliostat.runtime.search import Search, run_search

    taught = bool(context.inputs.get(SLOT))
    algorithm, trials, reason = config.method_when(taught=taught)
    objectives, earlier = objectives_of(config, context.task.metric_modes), _earlier(context, config)
    search = Search(
        Space.parse(config.space),
        algorithm,
        Budget(trials, config.wall_time_s, _bounds(config.stop_when, context.task.metric_modes)),
        objectives,
        scheduler=_settings(config.scheduler) if config.scheduler else None,
        start_from=_first(context, config, taught=taught),
        earlier=earlier,
    )
    outcome = run_search(context, search, work_of(context, config))
    states = [trial.status for trial in outcome.trials]
    write_trials(context.folder, outcome.trials)
    return StageResult(
        files=["trials.json", "journal.jsonl"],
        metrics=dict(outcome.best.metrics),
        params=outcome.best.params,
        details={
            "algorithm": algorithm,
            "why": reason,
            "objectives": [vars(objective) for objective in objectives.ordered],
            "limits": [vars(limit) for limit in objectives.limits],
            "ended_by": outcome.ended_by,
            "best_trial": outcome.best.id,
            "front": [
                {"trial": t.id, **{metric: t.metrics[metric] for metric in objectives.metrics}} for t in outcome.front
            ],
            "trials": {state: states.count(state) for state in ("done", "stopped", "failed")},
            **({"learned_from": f"{len(earlier)} earlier trials"} if earlier else {}),
            **outcome.failure_details,
            **({"rungs": [vars(rung) for rung in outcome.rungs]} if outcome.rungs else {}),
        },
    )


def work_of(context: StageContext, config: TuneConfig) -> "Work":
    """What a trial does: train, and be measured besides where the figures of its epochs are not all that is asked for.

    What the user's own loop reports, costs included, is all that is known of its trials.
    """
    from heliostat.runtime.training import Training

    if context.task.train_fn is None and (config.evaluate_after or config.costs):
        return appraisal_of(context, config.train, passes=config.evaluate_after, costs=tuple(config.costs))
    return Training(config.train, config.folds)


def _earlier(context: StageContext, config: TuneConfig) -> "tuple[TrialRecord, ...]":
    space, objectives = Space.parse(config.space), objectives_of(config, context.task.metric_modes)
    searches = [
        lessons_of(stated, root=context.root, space=space, objectives=objectives) for stated in config.earlier.values()
    ]
    for found in context.inputs.get(SLOT, ()):
        lessons = lessons_in(found.folder / JOURNAL, space=space, objectives=objectives)
        if not lessons.trials:
            context.reporter.warn(f"nothing to learn from {found.node}: {lessons}; {lessons.first_problem}")
        searches.append(lessons)
    return tuple(trial for lessons in searches for trial in lessons.trials)


def _first(context: StageContext, config: TuneConfig, *, taught: bool) -> Sequence[Mapping[str, Any]]:
    """The points that the file gives, else the one that it would train with."""
    if not _begins_with_known(config, taught=taught):
        return tuple(config.points.values())
    use_root(context.root)
    functions = {"model": resolve(context.task.model), "data": resolve(context.task.data)}
    point = _known_point(config, functions, seed=context.seed)
    return (point,) if point else ()


def _known_point(
    config: TuneConfig, functions: Mapping[str, Callable[..., Any]], *, seed: int
) -> dict[str, Any] | None:
    """What the file would train with, as far as it lies in the space; the rest is drawn."""
    space = Space.parse(config.space)
    return point_near(space, known_values(space, config.train, functions), random.Random(seed))


def _begins_with_known(config: TuneConfig, *, taught: bool) -> bool:
    """Whether there is something to learn from the first trial, and the file names no other beginning."""
    from heliostat.runtime.engines import engines

    algorithm, _, _ = config.method
    return engines()[algorithm].learns and not (config.start_from or taught)


def _settings(scheduler: SchedulerConfig) -> "Settings":
    from heliostat.runtime.scheduling import AshaSettings, MedianSettings

    _, options = scheduler.chosen
    kind = AshaSettings if isinstance(options, AshaConfig) else MedianSettings
    return kind(**options.model_dump())


def objectives_of(config: TuneConfig, modes: Mapping[str, Mode]) -> Objectives:
    """What is stated, else the first of the task's metrics on validation, else the loss there."""
    first = next((name for name in modes if name.startswith("val_") and name != "val_loss"), "val_loss")
    aims = config.aims or (ObjectiveConfig(metric=first),)
    ordered = tuple(Objective(aim.metric, aim.mode or _mode(aim.metric, modes)) for aim in aims)
    return Objectives(ordered, _bounds(config.limits, modes))


def _bounds(stated: Mapping[str, float], modes: Mapping[str, Mode]) -> tuple[Bound, ...]:
    return tuple(Bound(metric, value, _mode(metric, modes)) for metric, value in stated.items())


def _mode(metric: str, modes: Mapping[str, Mode]) -> Mode:
    return modes.get(metric, "min" if metric.endswith("loss") or metric in COSTS else "max")
