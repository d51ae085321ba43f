"""Whether a loss of the user's is exact where global batches are computed in parts: by workers, or one after another.

What is trained is the mean of the parts' losses, each weighted with its samples, or their sums divided by their
weights. For a mean over tokens with padding, for class weights, dice or a contrastive loss, the first is not the loss
of the global batch. So before the first epoch both are computed of a few real global batches, by the model as it is.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from heliostat.errors import StageError
from heliostat.training.batches import Batch, Share, epoch_batches
from heliostat.training.config import TrainConfig
from heliostat.training.losses import Loss, in_full_precision, mean_of, summed
from heliostat.training.seeding import keep_randomness, seed_everything
from heliostat.training.strategies.parallel import Parallel
from heliostat.training.task import Objective
from heliostat.training.world import World, any_worker

NUM_BATCHES = 4
"""The number of global batches on which the loss is checked."""
TOLERANCE = 1e-4
"""How far the two may be apart, relative to their size."""

LossOf = Callable[[list[Batch]], tuple[Loss, list[Loss]]]
"""The loss of a global batch as a whole, and of each of its parts."""


def notes_on_split_loss(
    parallel: Parallel, dataset: Dataset[Any], config: TrainConfig, objective: Objective, *, seed: int, min_rows: int
) -> dict[str, str]:
    """What a record says of the loss. Raises StageError where it is not exact and the config does not accept that.

    Every worker calls it before its first step, and looks at the same batches.
    """
    num_parts = parallel.data.size * config.parts_per_worker
    if num_parts == 1 or (objective.is_exact and objective.train_step is None):
        return {}
    device = parallel.data.device
    shares = epoch_batches(
        dataset,
        batch_size=config.batch_size,
        seed=seed,
        epoch=1,
        world=World(device=device),
        device=device,
        accumulate_steps=num_parts,
        max_steps=NUM_BATCHES,
        min_rows=min_rows,
    )
    was_training, restore_randomness = parallel.module.training, keep_randomness()
    try:
        parallel.module.eval()
        with torch.no_grad():
            whole, parts, is_random = _figures(_by_global_batch(shares), _loss_of(parallel, objective))
    except Exception as error:
        if objective.train_step is None:
            raise
        # A step may need gradients. What is wrong with it otherwise, training raises again.
        return {"split_loss": f"task.train_step cannot be tried without training, so nothing is checked: {error}"}
    finally:
        parallel.module.train(was_training)
        restore_randomness()
    name = "task.loss" if objective.train_step is None else "task.train_step"
    if any_worker(is_random, world=parallel.world):
        return {"split_loss": f"{name} draws random numbers, so it was not checked to be a mean over samples"}
    is_exact = _distance(whole, parts) <= TOLERANCE * max(abs(whole), abs(parts))
    if not any_worker(not is_exact and not math.isnan(whole), world=parallel.world):
        return {}
    figures = f"{whole:.6g} for a whole batch, {parts:.6g} from its {num_parts} parts"
    if config.split_loss == "average":
        return {"split_loss": f"{name} is no mean over samples ({figures}): the curve depends on how batches are split"}
    raise StageError(
        f"{name}: the loss is no mean over samples ({figures}), so training would depend on accumulate_steps and the "
        "number of workers; return the sum and its weight, such as `return losses.sum(), mask.sum()`, or accept the "
        "difference with `split_loss: average` in the train config"
    )


def _by_global_batch(shares: Iterable[tuple[Share, Batch]]) -> Iterator[list[Batch]]:
    parts: list[Batch] = []
    for share, batch in shares:
        parts.append(batch)
        if share.ends_step:
            yield parts
            parts = []


def _figures(batches: Iterable[list[Batch]], loss_of: LossOf) -> tuple[float, float, bool]:
    """The loss of a whole batch and that of its parts, where they are furthest apart; whether the loss is random."""
    furthest, is_random = (0.0, 0.0), False
    for parts in batches:
        seed_everything(0)
        whole, losses = loss_of(parts)
        seed_everything(1)
        again, _ = loss_of(parts)
        first, second = mean_of(whole).item(), mean_of(again).item()
        is_random = is_random or _distance(first, second) > TOLERANCE * abs(first)
        sums = [summed(loss, len(part[1])) for loss, part in zip(losses, parts)]
        total, weight = (torch.stack(values).sum().item() for values in zip(*sums))
        furthest = max(furthest, (first, total / weight if weight else 0.0), key=lambda pair: _distance(*pair))
    return *furthest, is_random


def _distance(one: float, other: float) -> float:
    """Infinite where just one of the two is no number, as the mean over nothing."""
    if math.isnan(one) or math.isnan(other):
        return 0.0 if math.isnan(one) and math.isnan(other) else math.inf
    return abs(one - other)


def _loss_of(parallel: Parallel, objective: Objective) -> LossOf:
    if (train_step := objective.train_step) is not None:

        def of_step(parts: list[Batch]) -> tuple[Loss, list[Loss]]:
            return train_step(parallel.module, _joined(parts)), [train_step(parallel.module, part) for part in parts]

        return of_step
    loss = objective.loss
    if isinstance(loss, nn.Module):  # one with a state of its own is left as it is
        loss = replace(objective, loss=copy.deepcopy(loss).eval()).part_of_loss

    def of_outputs(parts: list[Batch]) -> tuple[Loss, list[Loss]]:
        outputs = [in_full_precision(parallel.outputs(part[0])) for part in parts]
        return loss(torch.cat(outputs), _joined(parts)[1]), [loss(o, part[1]) for o, part in zip(outputs, parts)]

    return of_outputs


def _joined(parts: list[Batch]) -> Batch:
    """The global batch."""
    return tuple(torch.cat(items) if isinstance(items[0], Tensor) else items[0] for items in zip(*parts))
