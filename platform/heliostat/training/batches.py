"""Which samples every worker sees, and how they become batches.

`batch_size` is global. An epoch is one seeded permutation, the same for any number of workers, cut into global batches;
worker r takes the r-th part of each, and `accumulate_steps` cuts that part again. A share's weight makes the sum of its
losses' gradients, averaged over workers as DDP does, the exact mean over the global batch. A worker for which a short
last batch leaves nothing borrows one of its samples at weight 0: it still takes part in every collective, and its model
never sees an empty batch.

Batches are tuples `(inputs, targets, *extras)`. A `TensorDataset`, or a `Subset` of one, is indexed as whole tensors,
without any Python per sample.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from heliostat.errors import StageError
from heliostat.training.seeding import derive_seed
from heliostat.training.world import World

Batch = tuple[Any, ...]


@dataclass(frozen=True)
class Share:
    """One worker's part of one global batch, or one of the parts that it is computed in."""

    indices: Tensor
    num_samples: int
    """The samples that count: `len(indices)`, or 0 when the one index is borrowed."""
    weight: float
    """What the mean loss over the share is multiplied with before `backward`."""
    ends_step: bool
    """Whether the global batch is complete with this share."""


def split_evenly(num_samples: int, num_parts: int) -> list[int]:
    """Sizes of `num_parts` parts that differ by one at most, the larger ones first."""
    size, larger = divmod(num_samples, num_parts)
    return [size + (part < larger) for part in range(num_parts)]


def training_shares(
    num_samples: int, *, batch_size: int, seed: int, epoch: int, world: World, accumulate_steps: int = 1
) -> list[Share]:
    """One worker's shares of an epoch, in order. Every worker has the same number of steps."""
    generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
    order = torch.randperm(num_samples, generator=generator)
    shares = []
    for start in range(0, num_samples, batch_size):
        global_batch = order[start : start + batch_size]
        mine, count = _part_of(global_batch, world)
        parts = mine.tensor_split(min(accumulate_steps, len(mine)))
        for number, part in enumerate(parts, start=1):
            counted = len(part) if count else 0
            weight = counted * world.size / len(global_batch)
            shares.append(Share(part, num_samples=counted, weight=weight, ends_step=number == len(parts)))
    return shares


def evaluation_shares(num_samples: int, *, batch_size: int, world: World) -> list[Share]:
    """One worker's contiguous part of a split, in batches of at most `batch_size`."""
    mine, count = _part_of(torch.arange(num_samples), world)
    parts = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    return [Share(part, num_samples=len(part) if count else 0, weight=1.0, ends_step=True) for part in parts]


def _part_of(indices: Tensor, world: World) -> tuple[Tensor, int]:
    """This worker's part of the indices and how many of them count; one borrowed index, and 0, where there is none."""
    counts = split_evenly(len(indices), world.size)
    start = sum(counts[: world.rank])
    mine = indices[start : start + counts[world.rank]]
    return (mine, len(mine)) if len(mine) else (indices[-1:], 0)


def load_batches(
    dataset: Dataset[Any], shares: Sequence[Share], *, device: torch.device
) -> Iterator[tuple[Share, Batch]]:
    """Each share with its batch on the device. Raises StageError when a sample is not a tuple."""
    whole = _whole_tensors(dataset)
    batches: Iterable[Batch]
    if whole is None:
        # A generator of its own: a DataLoader would draw from the global one, and shift the dropout masks after it.
        loader = DataLoader(dataset, batch_sampler=[s.indices.tolist() for s in shares], generator=torch.Generator())
        batches = (_as_tuple(batch) for batch in loader)
    else:
        tensors, index_map = whole
        rows = (s.indices if index_map is None else index_map[s.indices] for s in shares)
        batches = (tuple(tensor.index_select(0, row) for tensor in tensors) for row in rows)
    for share, batch in zip(shares, batches):
        yield share, tuple(item.to(device) if isinstance(item, Tensor) else item for item in batch)


def _as_tuple(batch: Any) -> Batch:
    if not isinstance(batch, (tuple, list)):
        raise StageError(
            f"a sample must be a tuple (inputs, targets, ...), but the dataset gives {type(batch).__name__}"
        )
    return tuple(batch)


def _whole_tensors(dataset: Dataset[Any]) -> tuple[tuple[Tensor, ...], Tensor | None] | None:
    """The tensors below a dataset and which of their rows it consists of (None is all), or None when there are none.

    Subclasses are left alone: they may compute their samples.
    """
    if type(dataset) is TensorDataset:
        return dataset.tensors, None
    if type(dataset) is Subset and (inner := _whole_tensors(dataset.dataset)) is not None:
        tensors, index_map = inner
        indices = torch.as_tensor(dataset.indices)
        return tensors, indices if index_map is None else index_map[indices]
    return None
