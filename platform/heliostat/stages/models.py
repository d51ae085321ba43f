"""What the stages that make models share: from an artifact to a torch model and back, fine-tuning, and parity."""

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from heliostat.core.artifact import Artifact
from heliostat.core.imports import own_sources
from heliostat.core.spec import Task
from heliostat.core.stage import StageContext
from heliostat.errors import StageError
from heliostat.training.config import StrategyConfig, TrainConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from heliostat.training.batches import Batch
    from heliostat.training.checkpoints import Checkpoints
    from heliostat.training.loop import Fit

PARITY_SAMPLES = 256
BATCH = 64


def example_of(task: Task, config: TrainConfig) -> "Tensor":
    """A batch of one real sample: what exports are traced with."""
    return samples(task, config, split="val", count=1)


def samples(task: Task, config: TrainConfig, *, split: str, count: int) -> "Tensor":
    """The inputs of the first `count` samples of a split, as one batch."""
    import torch
    from torch.utils.data import IterableDataset

    from heliostat.training.task import build_data

    dataset: Any = build_data(task, config.data_args)[split]
    is_stream = isinstance(dataset, IterableDataset)
    rows = islice(dataset, count) if is_stream else (dataset[i] for i in range(min(count, len(dataset))))
    return torch.stack([torch.as_tensor(row[0]) for row in rows])


def train_config_of(artifact: Artifact) -> TrainConfig:
    """How the model of an artifact was trained: every model's record carries it on from the stage that trained it."""
    return TrainConfig.model_validate(artifact.record.params["train"])


def torch_model(artifact: Artifact) -> "nn.Module":
    """The artifact's model with parameters to train. Raises StageError for a format that has none."""
    from heliostat.compression.formats import load_torch

    described = describe(artifact.folder)
    if described["format"] != "torch":
        raise StageError(f"{artifact.node} is an {described['format']} model, which cannot be trained further")
    return load_torch(artifact.folder)


def describe(folder: Path) -> dict[str, Any]:
    """The artifact's `model.json`."""
    document: dict[str, Any] = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    return document


def save_trained(
    context: StageContext,
    model: "nn.Module",
    *,
    config: TrainConfig,
    history: Sequence[Mapping[str, Any]] = (),
    reference: str | None = None,
    **more: Any,
) -> list[str]:
    """Write a torch model artifact with the user's own source beside the weights; the names of its files.

    `more` goes to `formats.save_torch`.
    """
    from heliostat.compression.formats import save_torch

    reference = reference or context.task.model
    return save_torch(
        model,
        context.folder,
        reference=reference,
        model_args=config.model_args,
        history=history,
        code=own_sources([reference], context.root),
        example=example_of(context.task, config),
        **more,
    )


def checkpoints_of(context: StageContext, phase: str) -> "Checkpoints":
    """Where a training of a node's keeps its checkpoints: the last one in the folder itself, an earlier phase below."""
    from heliostat.training.checkpoints import Checkpoints

    return Checkpoints(context.folder / "checkpoints" / phase)


def fine_tune(
    context: StageContext,
    model: "nn.Module",
    config: TrainConfig,
    *,
    batch_loss: "Callable[[Tensor, Batch], Tensor] | None" = None,
    after_step: "Callable[[nn.Module], None] | None" = None,
    data: Any = None,
    phase: str = "",
    keep: Literal["best", "last"] = "best",
    earlier: int = 0,
) -> "Fit":
    """Train `model` in place with the one loop, going on from the node's own checkpoints after a crash.

    It is one worker that does, whatever strategy the model was first trained with.
    A stage that trains more than once names each `phase` but the last, and says how many `earlier` epochs it reported.
    The model ends with the weights of the best epoch, or the last.
    """
    from heliostat.training.loop import fit
    from heliostat.training.seeding import seed_everything
    from heliostat.training.task import build_data, build_objective

    seed_everything(context.seed)
    fitted = fit(
        model,
        data or build_data(context.task, config.data_args),
        config.model_copy(update={"strategy": StrategyConfig(name="single")}),
        objective=build_objective(context.task),
        seed=context.seed,
        on_epoch=lambda epoch, row: context.reporter.metrics(row, step=earlier + epoch),
        checkpoints=checkpoints_of(context, phase),
        batch_loss=batch_loss,
        after_step=after_step,
    )
    if keep == "best":
        model.load_state_dict(fitted.state)
    return fitted


def backward_on(task: Task, config: TrainConfig, *, count: int) -> "Callable[[nn.Module], None]":
    """A function that adds to a model's parameters the gradients of the loss over so many training samples, or all."""
    import torch

    from heliostat.training.batches import epoch_batches
    from heliostat.training.task import build_data, build_objective
    from heliostat.training.world import World

    train, loss, steps = build_data(task, config.data_args)["train"], build_objective(task).loss, -(-count // BATCH)

    def backward(model: "nn.Module") -> None:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for _, batch in epoch_batches(
            train, batch_size=BATCH, seed=0, epoch=1, world=World(), device=torch.device("cpu"), max_steps=steps
        ):
            loss(model(batch[0]), batch[1]).backward()  # type: ignore[no-untyped-call]

    return backward


def parity(context: StageContext, config: TrainConfig, source: Any, *, against: str) -> dict[str, Any]:
    """How far the artifact, saved and loaded again, is from `source` on real samples of the validation split."""
    from heliostat.compression.formats import load_model
    from heliostat.compression.measure import compare_outputs

    inputs = samples(context.task, config, split="val", count=PARITY_SAMPLES)
    return {"against": against, **compare_outputs(load_model(context.folder), source, inputs)}
