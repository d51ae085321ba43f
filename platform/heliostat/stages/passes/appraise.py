"""What a trial's model is worth after the passes: made and measured as the stages would."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from heliostat.compression.formats import load_model
from heliostat.compression.measure import measure_speed
from heliostat.compression.size import num_params, size_mb
from heliostat.core.spec import Task
from heliostat.core.stage import StageResult
from heliostat.errors import HeliostatError, StageError
from heliostat.stages.evaluate_after import PassConfig
from heliostat.stages.measure import SECONDS_PER_BATCH_SIZE
from heliostat.stages.passes.prune import prune_model
from heliostat.stages.passes.quantize import quantize_model
from heliostat.stages.passes.workshop import Workshop
from heliostat.training.config import TrainConfig
from heliostat.training.evaluation import evaluate
from heliostat.training.seeding import seed_everything
from heliostat.training.task import Data, build_model, build_objective

PASSES: dict[str, Callable[[Workshop, Any, Any], StageResult]] = {"prune": prune_model, "quantize": quantize_model}


@dataclass(frozen=True)
class Made:
    """A model on its way through the passes."""

    node: str
    folder: Path


def appraise(
    weights: dict[str, Tensor],
    *,
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
        )
        seed_everything(seed)
        model = build_model(task, config.model_args)
        model.load_state_dict(weights)
        shop.folder.mkdir()
        shop.save(model.eval())
        made = Made("train", shop.folder)
        for index, step in enumerate(passes):
            uses, settings = step.chosen
            folder = Path(scratch, f"{index}-{uses}")
            folder.mkdir()
            try:
                PASSES[uses](replace(shop, folder=folder), made, settings)
            except HeliostatError as error:
                raise StageError(f"evaluate_after[{index}] ({uses}): {error}") from error
            made = Made(uses, folder)
            give_way()

        figures: dict[str, float] = {"size_mb": size_mb(made.folder), "num_params": num_params(made.folder)}
        finished = load_model(made.folder)
        if passes:
            figures |= evaluate(finished, data["val"], build_objective(task), split="val")
        if timed:
            rows = shop.samples("val", 1)
            finished(rows)
            with alone():
                speed = measure_speed({"": (finished, rows)}, batches=(1,), min_seconds=SECONDS_PER_BATCH_SIZE)
            figures["latency_ms"] = speed[""]["latency_ms"]
        return figures
