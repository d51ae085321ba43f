"""What a trial's model is worth after the passes: made and measured as the stages would."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType

from torch import Tensor

from heliostat.compression.formats import Model, load_model
from heliostat.compression.measure import measure_speed
from heliostat.compression.size import num_params, size_mb
from heliostat.core.spec import Task
from heliostat.core.stage import StageResult, Validated
from heliostat.errors import HeliostatError, StageError
from heliostat.stages.evaluate_after import PassConfig
from heliostat.stages.measure import SECONDS_PER_BATCH_SIZE
from heliostat.stages.passes.registry import PASSES
from heliostat.stages.passes.workshop import Workshop
from heliostat.stages.saved import check_made
from heliostat.training.config import TrainConfig
from heliostat.training.evaluation import evaluate
from heliostat.training.seeding import seed_everything
from heliostat.training.task import Data, build_model, build_objective
from heliostat.training.trained_loss import load_loss


@dataclass(frozen=True)
class Made:
    """A model on its way through the passes."""

    node: str
    folder: Path


def appraise(
    weights: dict[str, Tensor],
    *,
    loss_state: Mapping[str, Tensor] = MappingProxyType({}),
    validated: Mapping[str, float] = MappingProxyType({}),
    task: Task,
    root: Path,
    seed: int,
    passes: Sequence[PassConfig],
    timed: bool,
    config: TrainConfig,
    data: Data,
    give_way: Callable[[], None],
    alone: Callable[[], AbstractContextManager[None]],
) -> dict[str, float]:
    """The figures of the model that has these weights, after the passes: costs, and where there are any, of `val`.

    `validated` is the row of the weights' epoch, `loss_state` what the loss was trained to until then.

    `latency_ms` (`timed`) is measured within `alone`. Raises StageError, which names the pass, where one fails.
    """
    with TemporaryDirectory(prefix="heliostat-") as scratch:
        shop = Workshop(
            task=task,
            recipe=config,
            data=data,
            seed=seed,
            root=root,
            folder=Path(scratch, "train"),
            on_epoch=lambda epoch, row: give_way(),
            loss_state=dict(loss_state),
        )
        seed_everything(seed)
        model = build_model(task, config.model_args)
        model.load_state_dict(weights)
        shop.folder.mkdir()
        files = shop.save(model.eval())
        if passes:
            check_made(shop, StageResult(files, validated=Validated(validated)))
        made = Made("train", shop.folder)
        for index, step in enumerate(passes):
            uses, settings = step.chosen
            folder = Path(scratch, f"{index}-{uses}")
            folder.mkdir()
            try:
                shop = replace(shop, folder=folder)
                check_made(shop, PASSES[uses](shop, made, settings))
            except HeliostatError as error:
                raise StageError(f"evaluate_after[{index}] ({uses}): {error}") from error
            made = Made(uses, folder)
            give_way()

        figures = costs_of(made.folder)
        finished = load_model(made.folder)
        if passes:
            objective = build_objective(task, load_loss(made.folder))
            figures |= evaluate(finished, data["val"], objective, split="val", batch_size=shop.batch_size)
        return figures | (latency_of(finished, shop, alone=alone) if timed else {})


def costs_of(folder: Path) -> dict[str, float]:
    """What can be told of a model without running it."""
    return {"size_mb": size_mb(folder), "num_params": num_params(folder)}


def latency_of(model: Model, shop: Workshop, *, alone: Callable[[], AbstractContextManager[None]]) -> dict[str, float]:
    """`latency_ms` of a loaded model on one thread, measured within `alone`."""
    rows = shop.samples("val", 1)
    model(rows)
    with alone():
        speed = measure_speed({"": (model, rows)}, batches=(1,), min_seconds=SECONDS_PER_BATCH_SIZE)
    return {"latency_ms": speed[""]["latency_ms"]}
