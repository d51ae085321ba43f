"""What stages that make models share: from an artifact to a torch model and back, fine-tuning, and parity."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heliostat.core.artifact import Artifact
from heliostat.core.spec import Task
from heliostat.core.stage import StageContext
from heliostat.errors import StageError
from heliostat.training.config import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from heliostat.stages.passes.workshop import Source, Workshop
    from heliostat.training.loop import Fit


def workshop_of(context: StageContext, recipe: TrainConfig) -> "Workshop":
    """Where a stage makes a model that was, or is to be, trained by `recipe`."""
    from heliostat.runtime.side_by_side import side_by_side
    from heliostat.stages.passes.workshop import Workshop
    from heliostat.training.task import build_data
    from heliostat.training.trained_loss import load_loss

    trained = [load_loss(source.folder) for sources in context.inputs.values() for source in sources]
    return Workshop(
        task=context.task,
        recipe=recipe,
        data=build_data(context.task, recipe.data_args),
        seed=context.seed,
        root=context.root,
        folder=context.folder,
        shelf=context.shelf,
        on_epoch=lambda epoch, row: context.reporter.metrics(row, step=epoch),
        warn=context.reporter.warn,
        loss_state=next(filter(None, trained), {}),
        side_by_side=partial(side_by_side, root=context.root, retries=context.retries),
    )


def samples(task: Task, config: TrainConfig, *, split: str, count: int) -> "Tensor":
    """The inputs of the first `count` samples of a split, as one batch."""
    from heliostat.stages.passes.workshop import first_inputs
    from heliostat.training.task import build_data

    return first_inputs(build_data(task, config.data_args), split=split, count=count)


def train_config_of(artifact: Artifact) -> TrainConfig:
    """How the model of an artifact was trained: every model's record carries it on from the stage that trained it."""
    return TrainConfig.model_validate(artifact.record.params["train"])


def torch_model(source: "Source") -> "nn.Module":
    """The source's model with parameters to train. Raises StageError for a format that has none."""
    from heliostat.compression.formats import load_torch

    described = describe(source.folder)
    if described["format"] != "torch":
        raise StageError(f"{source.node} is in the format {described['format']!r}, which cannot be trained further")
    return load_torch(source.folder)


def describe(folder: Path) -> dict[str, Any]:
    """The artifact's `model.json`."""
    document: dict[str, Any] = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    return document


def save_trained(
    context: StageContext,
    model: "nn.Module",
    *,
    config: TrainConfig,
    loss_state: "dict[str, Tensor] | None" = None,
    **more: Any,
) -> list[str]:
    """`Workshop.save` in a stage, of a model trained by `config`, and of the loss as it was trained with it."""
    shop = workshop_of(context, config)
    return (shop if loss_state is None else replace(shop, loss_state=loss_state)).save(model, **more)


def fine_tune(context: StageContext, model: "nn.Module", config: TrainConfig, **more: Any) -> "Fit":
    """`Workshop.fine_tune` in a stage."""
    return workshop_of(context, config).fine_tune(model, config, **more)


def parity(context: StageContext, config: TrainConfig, source: Any, *, against: str) -> dict[str, Any]:
    """`Workshop.parity` in a stage, of a model trained by `config`."""
    return workshop_of(context, config).parity(source, against=against)


def reload_parity(context: StageContext, config: TrainConfig, model: "nn.Module") -> dict[str, Any]:
    """`Workshop.reload_parity` in a stage, of a model trained by `config`."""
    return workshop_of(context, config).reload_parity(model)
