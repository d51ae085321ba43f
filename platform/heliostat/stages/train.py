"""`train`: several workers through Ray Train, or one in place; the best epoch by validation is the artifact."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heliostat.core.artifact import Record
from heliostat.core.capacity import Need
from heliostat.core.paths import overlay
from heliostat.core.spec import Resources
from heliostat.core.stage import ConfigView, StageContext, StageResult, Unheard, Validated, stage
from heliostat.stages.checks import check_arguments, check_loop, check_monitor
from heliostat.training.config import TrainConfig as TrainConfig
from heliostat.training.config import explain_split

if TYPE_CHECKING:
    from heliostat.training.progress import Fit

ELASTIC = ("ddp", "fsdp")
"""The strategies by which another number of workers trains the same model in the same way."""


def _check(config: TrainConfig, view: ConfigView) -> Iterator[str]:
    searched = [path for _, upstream in view.inputs.get("params", ()) for path in getattr(upstream, "searched", ())]
    partial = any(not hasattr(upstream, "searched") for _, upstream in view.inputs.get("params", ()))
    yield from check_arguments(config, view, place="config", more=searched, partial=partial)
    yield from check_monitor(config, view, place="config")
    yield from check_loop(config, view, place="config", workers=view.resources.workers)
    if view.resources.is_elastic and config.strategy.name not in ELASTIC:
        name, known = config.strategy.name, " or ".join(ELASTIC)
        yield f"resources.workers: {name!r} may train otherwise with another number of them; give one, or take {known}"


def _needs(resources: Resources) -> Need:
    return Need(resources.workers, resources.per_worker)


def _explain(config: TrainConfig, view: ConfigView) -> Mapping[str, str]:
    least, most = view.resources.workers, view.resources.most_workers
    elastic = {"workers": f"{least} to {most}, as the nodes have room"} if most > least else {}
    return {**elastic, **_explain_strategy(config, view), **explain_split(config, workers=most, task=view.task)}


def _explain_strategy(config: TrainConfig, view: ConfigView) -> Mapping[str, str]:
    strategy, resources = config.strategy, view.resources
    if strategy.name in ("single", "ddp") or resources.workers == 1:
        return {}
    if view.inputs.get("params"):
        return {"strategy": f"{strategy.name}, of the model that the search finds"}
    model, workers = view.functions["model"], resources.workers
    if strategy.name == "auto":
        from heliostat.training.strategies.forecast import forecast

        return forecast(
            model,
            config,
            workers=workers,
            gpus_per_worker=resources.gpus_per_worker,
            own_step=view.task.train_step is not None,
            own_loop=view.task.train_fn is not None,
        )
    from heliostat.training.strategies.preview import preview

    return {"strategy": preview(model, config, workers=workers)}


def _call_up(folder: Path, resources: Resources) -> None:
    from heliostat.runtime.standby import call_up

    call_up(folder, resources)


def _params_used(config: TrainConfig, inputs: Mapping[str, Sequence[Record]]) -> Mapping[str, Any]:
    for found in inputs.get("params", ()):
        config = overlay(config, found.params, place=f"{found.node}'s parameters")
    return config.model_dump(mode="json")


@stage(
    "train",
    inputs={"params": "params?"},
    output="model",
    measured="later",
    place="driver",
    needs=_needs,
    preload=lambda resources: ["heliostat.runtime.ray_train"] if resources.most_workers > 1 else (),
    call_up=_call_up,
    works_apart=lambda resources: True,
    workload=lambda config: {"epochs": config.epochs},
    check=_check,
    params_used=_params_used,
    explain=_explain,
)
def train(context: StageContext, config: TrainConfig) -> StageResult:
    """Train the task's model. The parameters that a search found override the config."""
    from heliostat.runtime.trainer import train_workers

    for found in context.inputs.get("params", ()):
        config = overlay(config, found.record.params, place=f"{found.node}'s parameters")
    assert context.cancel is not None
    apart = replace(context, reporter=Unheard(), cancel=None)
    result: StageResult = train_workers(
        context.task,
        config,
        resources=context.resources,
        seed=context.seed,
        root=context.root,
        folder=context.folder,
        reporter=context.reporter,
        cancel=context.cancel,
        retries=context.retries,
        carrier=context.carrier,
        finish=partial(_keep, apart, config),
        check_own=partial(_check_own, apart, config),
    )
    return result


def _check_own(
    context: StageContext, config: TrainConfig, row: Mapping[str, float], weights: Mapping[str, Any]
) -> None:
    """Raise StageError for weights of another model than the task's, or that give other figures than were reported."""
    from heliostat.stages.saved import check_saved
    from heliostat.training.evaluation import evaluate
    from heliostat.training.seeding import keep_randomness, seed_everything
    from heliostat.training.task import build_data, build_model, build_objective
    from heliostat.training.weights import load_weights

    restore_randomness = keep_randomness()
    try:
        seed_everything(context.seed)
        model = build_model(context.task, config.model_args)
        load_weights(model, weights)
        objective, data = build_objective(context.task), build_data(context.task, config.data_args)
        if any(name in row for name in ("val_loss", *(f"val_{metric.name}" for metric in objective.metrics))):
            measure = partial(evaluate, model, data["val"], objective, split="val")
            check_saved(context.folder, Validated(row, by_own_loop=True), measure(), data=data, again=measure)
    finally:
        restore_randomness()


def _keep(context: StageContext, config: TrainConfig, fitted: "Fit") -> StageResult:
    """Write the artifact, in the process of the first worker."""
    from heliostat.stages.models import reload_parity, save_trained
    from heliostat.training.seeding import seed_everything
    from heliostat.training.task import build_model
    from heliostat.training.weights import load_weights

    seed_everything(context.seed)
    model = build_model(context.task, config.model_args)
    load_weights(model, fitted.state)
    files = save_trained(context, model.eval(), config=config, loss_state=fitted.loss_state)
    return StageResult(
        files=files,
        metrics=fitted.metrics,
        validated=Validated(fitted.metrics, fitted.layers, by_own_loop=context.task.train_fn is not None),
        params={"train": config.model_dump(mode="json", exclude_unset=True)},
        details={
            "best_epoch": fitted.epoch,
            "epochs": fitted.epochs,
            "history": fitted.history,
            "validations": fitted.validations,
            **fitted.choice,
            **fitted.notes,
            "parity": {"reload": reload_parity(context, config, model)},
        },
    )
