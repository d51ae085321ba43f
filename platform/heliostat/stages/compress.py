"""`compress`: finds the chain of passes itself, within limits, through Ray Tune; the artifact is the best model.

A trial makes one chain and measures it: quality on `val`, size, and latency while other trials of its node pause. What
of that no other is better than, within the limits, is then measured as every model is, together with the uncompressed
model; by those figures the best is chosen.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heliostat.core.artifact import Artifact, Record
from heliostat.core.capacity import Need
from heliostat.core.integrity import check_names
from heliostat.core.objective import Mode, Objective, Objectives
from heliostat.core.stage import ConfigView, StageContext, StageResult, stage
from heliostat.errors import StageError
from heliostat.stages.checks import check_trainable
from heliostat.stages.choosing import candidates_table, check_demands
from heliostat.stages.compress_config import (
    MADE,
    CompressConfig,
    Link,
    check_steps,
    links_of,
)
from heliostat.stages.measure import recipe_of
from heliostat.stages.trials_file import write_trials
from heliostat.stages.tune_config import COSTS

if TYPE_CHECKING:
    from heliostat.compression.pareto import Choice
    from heliostat.runtime.journal import TrialRecord
    from heliostat.runtime.making import Making
    from heliostat.runtime.search import SearchOutcome

__all__ = ["CompressConfig", "compress"]


@dataclass(frozen=True)
class _Kept:
    """What a chain of the front came to."""

    folder: str
    """In the node's own."""
    files: Sequence[str]
    params: Mapping[str, Any]
    """As in a record: how it was trained."""
    last: Link
    """The last of what was done."""


def _check(config: CompressConfig, view: ConfigView) -> Iterator[str]:
    yield from check_trainable(view, slot="model")
    yield from check_demands(config, view, costs=COSTS)
    yield from check_steps(config, view)
    if not config.max_drop:
        quality = next(
            (name for name in view.task.metric_modes if name.startswith("val_") and "loss" not in name), None
        )
        example = f"{{{quality or 'val_loss'}: 0.01}}"
        yield f"config.max_drop: empty; say how much worse than the uncompressed model a model may be, as {example}"
    if view.resources.workers_per_trial > 1:
        yield "config.passes: one worker makes and measures a chain; set resources.workers_per_trial to 1"


def _explain(config: CompressConfig, view: ConfigView) -> Mapping[str, str]:
    algorithm, trials = config.method
    size = config.space.size()
    return {"chains": f"{trials} of {size or 'endlessly many'} by {algorithm}, the uncompressed model first"}


def _params_used(config: CompressConfig, inputs: Mapping[str, Sequence[Record]]) -> Mapping[str, Any]:
    """With the recipe of the model, which what trains in a chain takes over."""
    recipe = recipe_of(inputs["model"][0].params)
    return {**config.model_dump(mode="json"), "train": recipe.model_dump(mode="json")}


@stage(
    "compress",
    inputs={"model": "model"},
    output="model",
    version=3,
    place="driver",
    needs=lambda resources: Need(1, resources.per_worker),
    workload=lambda config: {"trials": config.method[1]},
    check=_check,
    params_used=_params_used,
    explain=_explain,
    keeps_metrics=True,
    preload=lambda resources: ["heliostat.runtime.trials", "optuna"],
)
def compress(context: StageContext, config: CompressConfig) -> StageResult:
    """Search, measure the front of what was found, and choose. Each model of the front is kept, in `front/{trial}/`.

    Raises StageError when no chain is within the limits; it names the closest.
    """
    source, modes = context.one("model"), context.task.metric_modes
    objectives = objectives_of(context, config)
    outcome = _search(context, config, objectives)
    trials = {f"{trial.id} {config.label(trial.params)}": trial for trial in outcome.trials}
    chains = {name: _chain(context, config, source, trial) for name, trial in trials.items()}
    verdicts = _verdicts_of_the_search(config, trials, modes)
    good = {name: trial.metrics for name, trial in trials.items() if trial.was_judged and chains[name]}
    front = {name: _keep(context, trials[name], chains[name]) for name in objectives.front(good)}
    metrics, speeds = _measure(context, source, front)
    choice = _choose(config, (source.node, metrics[source.node]), metrics, modes)
    verdicts |= {verdict.name: verdict.reason for verdict in choice.verdicts}
    chosen = front[choice.chosen]
    _copy(context.folder / chosen.folder, chosen.files, context.folder)
    write_trials(context.folder, outcome.trials)
    return StageResult(
        files=[
            *chosen.files,
            *(f"{kept.folder}/{name}" for kept in front.values() for name in kept.files),
            "trials.json",
            "journal.jsonl",
        ],
        metrics=metrics[choice.chosen],
        params=chosen.params,
        details={
            "chosen": choice.chosen,
            "baseline": source.node,
            "steps": config.written(trials[choice.chosen].params),
            "algorithm": config.method[0],
            "ended_by": outcome.ended_by,
            "trials": dict(Counter(trial.status for trial in outcome.trials)),
            **outcome.failure_details,
            "passes": {
                "in_all_chains": sum(map(len, chains.values())),
                "made": len({link.digest for links in chains.values() for link in links}),
            },
            "speed": speeds[choice.chosen],
            "table": [
                {**row, **({"folder": front[row["model"]].folder} if row["model"] in front else {})}
                for row in candidates_table(metrics[source.node], metrics, choice, modes=modes)
            ],
            "chains": [
                {
                    "chain": name,
                    **{metric: trial.metrics.get(metric) for metric in objectives.metrics},
                    "why": verdicts[name],
                }
                for name, trial in trials.items()
            ],
        },
    )


def objectives_of(context: StageContext, config: CompressConfig) -> Objectives:
    """The quality that is limited and the costs that are made small, within the limits."""
    from heliostat.compression.pareto import bounds

    source, modes = context.one("model"), context.task.metric_modes
    for metric in config.max_drop:
        if metric not in source.metrics:
            raise StageError(f"{source.node} has no {metric}, so nobody can say how much it drops")
    quality = tuple(Objective(metric, modes[metric]) for metric in config.max_drop)
    costs = tuple(Objective(metric, "min") for metric in config.minimize)
    limits = bounds(source.metrics, max_drop=config.max_drop, at_most=config.at_most, directions=modes)
    return Objectives((*quality, *costs), limits)


def _search(context: StageContext, config: CompressConfig, objectives: Objectives) -> "SearchOutcome":
    from heliostat.runtime.ledger import Budget
    from heliostat.runtime.search import Search, run_search

    context.shelf.mkdir(parents=True, exist_ok=True)
    if not any(context.folder.iterdir()):
        _forget_failures(context.shelf)
    algorithm, trials = config.method
    budget = Budget(trials, config.wall_time_s)
    search = Search(config.space, algorithm, budget, objectives, start_from=[config.untouched])
    return run_search(context, search, work_of(context, config))


def work_of(context: StageContext, config: CompressConfig) -> "Making":
    """What a trial does: make one chain, and measure what comes of it."""
    from heliostat.runtime.making import Making

    source = context.one("model")
    make = partial(
        _explore,
        config=config,
        source=source,
        shelf=context.shelf,
        task=context.task,
        root=context.root,
        seed=context.seed,
    )
    return Making(recipe_of(source.record.params), make, config.beginnings, config.code_references)


def _forget_failures(shelf: Path) -> None:
    """A new search tries again what could not be done in others: that may have been mended since."""
    for made in shelf.glob(f"*/{MADE}"):
        if "failed" in json.loads(made.read_text(encoding="utf-8")):
            made.unlink()


def _explore(params: Mapping[str, Any], **settings: Any) -> dict[str, float]:
    """In the process of a trial: the driver of a search imports no torch."""
    from heliostat.stages.passes.chain import explore

    return explore(params, **settings)


def _chain(context: StageContext, config: CompressConfig, source: Artifact, trial: "TrialRecord") -> list[Link]:
    return links_of(config.steps(trial.params), start=source.record.fingerprint, seed=context.seed, root=context.root)


def _verdicts_of_the_search(
    config: CompressConfig, trials: "Mapping[str, TrialRecord]", modes: Mapping[str, Mode]
) -> dict[str, str]:
    """Why each chain is what it is beside the others, by what the trials measured."""
    from heliostat.runtime.failures import commonest

    verdicts = {name: f"{trial.status}: {trial.reason}" for name, trial in trials.items() if not trial.was_judged}
    good = {name: trial.metrics for name, trial in trials.items() if name not in verdicts}
    uncompressed, *_ = trials
    if uncompressed in verdicts:
        raise StageError(f"the uncompressed model cannot be measured: {verdicts[uncompressed]}")
    if len(good) == 1:
        reasons = commonest(trials[name].reason or "" for name in verdicts)
        raise StageError(f"none of {len(verdicts)} chains came to an end\n{reasons}")
    choice = _choose(config, (uncompressed, good[uncompressed]), good, modes)
    return verdicts | {verdict.name: verdict.reason for verdict in choice.verdicts}


def _choose(
    config: CompressConfig,
    baseline: tuple[str, Mapping[str, float]],
    metrics: Mapping[str, Mapping[str, float]],
    modes: Mapping[str, Mode],
) -> "Choice":
    from heliostat.compression.pareto import choose

    return choose(
        baseline,
        metrics,
        max_drop=config.max_drop,
        minimize=config.minimize,
        at_most=config.at_most,
        directions=modes,
        baseline_competes=False,
    )


# --- the front ---------------------------------------------------------------------------------------


def _keep(context: StageContext, trial: "TrialRecord", links: Sequence[Link]) -> _Kept:
    """A copy of what a chain came to, where it stays."""
    made = context.shelf / links[-1].digest
    outcome = json.loads((made / MADE).read_text(encoding="utf-8"))
    folder = f"front/{trial.id}"
    files = list(outcome["files"])
    check_names(files, place=str(made / MADE))
    _copy(made, files, context.folder / folder)
    return _Kept(folder, files, outcome["params"], links[-1])


def _copy(source: Path, names: Sequence[str], target: Path) -> None:
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def _measure(
    context: StageContext, source: Artifact, front: Mapping[str, _Kept]
) -> tuple[dict[str, dict[str, float]], dict[str, Mapping[str, Any]]]:
    """By name the metrics of the models, the uncompressed one first, and how their speed was measured.

    Quality is computed side by side, and the speed of all of them in turns with every CPU of a node held.
    """
    from heliostat.runtime.tasks import run_task
    from heliostat.stages.measure import Subject, measure_quality, measure_speeds

    run = partial(run_task, root=context.root, cancel=context.cancel)

    def quality(kept: _Kept) -> dict[str, float]:
        figures: dict[str, float] = run(
            measure_quality,
            context.folder / kept.folder,
            context.task,
            kept.params,
            held=context.resources.per_worker,
            retries=context.retries,
        )
        return figures

    context.reporter.progress(doing=f"measuring the front, {len(front)} models")
    with ThreadPoolExecutor(len(front), thread_name_prefix="quality") as pool:
        qualities = [source.metrics, *pool.map(quality, front.values())]
    subjects = [Subject(source.folder, source.record.params, source.record.uses)]
    for kept in front.values():
        method = getattr(kept.last.config, "method", kept.last.uses)
        subjects.append(Subject(context.folder / kept.folder, kept.params, method, source.folder))
    speeds = run(measure_speeds, subjects, context.task, exclusive=True, retries=context.retries)
    metrics: dict[str, dict[str, float]] = {}
    details: dict[str, Mapping[str, Any]] = {}
    for name, figures, speed in zip((source.node, *front), qualities, speeds):
        if isinstance(speed, str):
            raise StageError(f"{name}: {speed}")
        metrics[name], details[name] = {**figures, **speed.metrics}, speed.details
    return metrics, details
