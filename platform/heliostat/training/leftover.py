"""Whether a model can train on a single sample, as the last batch of an epoch or a worker's part of one may be.

Batch norm cannot, where it has one value for each channel, and neither can a loss that compares samples or squeezes its
inputs. It is tried on a copy of the model, and only where the numbers lead to a single sample. How global batches are
cut does not depend on the number of workers: if one worker has no single sample, nothing is merged for several.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from heliostat.errors import SpecError
from heliostat.training.batches import first_rows, shares_of
from heliostat.training.config import TrainConfig
from heliostat.training.losses import LossRule, mean_of
from heliostat.training.seeding import keep_randomness
from heliostat.training.world import World, any_worker


@dataclass(frozen=True)
class MinRows:
    """The fewest samples that a model is trained on at once."""

    rows: int = 1
    why: str = ""
    """Why one sample would not do; empty where it does, or where none comes alone."""

    @property
    def notes(self) -> dict[str, str]:
        """What a record says of it."""
        if self.rows == 1:
            return {}
        return {"batches": f"single samples join the batch beside them: the model cannot train on one ({self.why})"}


def find_min_rows(
    model: nn.Module, dataset: Dataset[Any], config: TrainConfig, *, rule: LossRule, world: World
) -> MinRows:
    """2 if the model or its loss fails on one sample but not on two, and the epoch would have one alone.

    Raises SpecError where every batch would be a single sample.
    """
    if not _leaves_one(dataset, config, world):
        return MinRows()
    why = _why_not_one(model, dataset, rule, world)
    if not any_worker(bool(why), world=world):
        return MinRows()
    if config.batch_size == 1 and why:
        raise SpecError(f"batch_size: the model or its loss cannot train on one sample ({why}); take 2 or more")
    return MinRows(2, why)


def _leaves_one(dataset: Dataset[Any], config: TrainConfig, world: World) -> bool:
    """Return whether a batch, a part of one or a worker's share may be a single sample. In a stream it may."""
    if isinstance(dataset, IterableDataset):
        return True
    num_samples: int = len(dataset)  # type: ignore[arg-type]
    return any(
        len(share.indices) == 1
        for size in {min(config.batch_size, num_samples), num_samples % config.batch_size or config.batch_size}
        for rank in range(world.size)
        for share in shares_of(
            torch.arange(size),
            world=World(rank, world.size),
            accumulate_steps=config.accumulate_steps,
            min_rows=1,
        )
    )


def _why_not_one(model: nn.Module, dataset: Dataset[Any], rule: LossRule, world: World) -> str:
    """What the model says to one sample if it takes two; nothing where it takes one, or none at all."""
    restore_randomness = keep_randomness()
    try:
        why = _failure(model, dataset, rule, world, count=1)
        return "" if why and _failure(model, dataset, rule, world, count=2) else why
    finally:
        restore_randomness()


def _failure(model: nn.Module, dataset: Dataset[Any], rule: LossRule, world: World, *, count: int) -> str:
    try:
        tried = copy.deepcopy(model).to(world.device).train()
        loss = mean_of(rule.loss(tried, first_rows(dataset, count, device=world.device)))
        torch.autograd.grad(loss, [p for p in tried.parameters() if p.requires_grad], allow_unused=True)
    except Exception as error:  # a model may raise anything
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return "" if loss.isfinite().all() else f"its loss is {loss.item()}"
