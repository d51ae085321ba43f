"""Which samples every worker sees, and how they become batches.

`batch_size` is global. An epoch is one seeded permutation, the same for any number of workers, cut into global batches;
`accumulate_steps` cuts each into parts, and worker r takes the r-th share of every part. So the samples whose gradients
and statistics are computed together are the same for any number of workers. A share's weight makes the sum of its
losses' gradients, averaged over workers as DDP does, the exact mean over the global batch. A worker for which a short
part leaves nothing borrows one of its samples at weight 0: it still takes part in every collective, and its model
never sees an empty batch. Some models, such as those with batch norm, cannot train on one sample: for them what would
be left over is merged with its neighbour (`min_rows`; `training/leftover.py` says when). A split is evaluated in the
same batches by any number of workers, which take runs of them.

A stream (an `IterableDataset`) has no permutation: its global batches are its samples in their order.

Batches are tuples `(inputs, targets, *extras)`. A `TensorDataset`, or a `Subset` of one, is indexed as whole tensors,
without any Python per sample.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from heliostat.errors import StageError
from heliostat.training.seeding import derive_seed
from heliostat.training.structure import collate
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
    is_whole: bool = False
    """Whether it is the whole global batch, which one worker has."""


def split_evenly(num_samples: int, num_parts: int) -> list[int]:
    """Sizes of `num_parts` parts that differ by one at most, the larger ones first."""
    size, larger = divmod(num_samples, num_parts)
    return [size + (part < larger) for part in range(num_parts)]


def training_shares(
    num_samples: int,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    world: World,
    accumulate_steps: int = 1,
    min_rows: int = 1,
) -> list[Share]:
    """One worker's shares of an epoch, in order. Every worker has the same number of steps, and of shares in each."""
    generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
    batches = list(torch.split(torch.randperm(num_samples, generator=generator), batch_size))
    if len(batches) > 1 and len(batches[-1]) < min_rows:
        batches[-2:] = [torch.cat(batches[-2:])]
    return [
        share
        for global_batch in batches
        for share in shares_of(global_batch, world=world, accumulate_steps=accumulate_steps, min_rows=min_rows)
    ]


def shares_of(global_batch: Tensor, *, world: World, accumulate_steps: int, min_rows: int) -> list[Share]:
    """One worker's shares of one global batch of indices."""
    size = len(global_batch)
    num_parts = max(1, min(accumulate_steps, size // min_rows))
    parts = [_part_of(part, world, min_rows) for part in global_batch.tensor_split(num_parts)]
    is_whole = world.size == num_parts == 1
    return [
        Share(part, n, weight=n * world.size / size, ends_step=number == len(parts), is_whole=is_whole)
        for number, (part, n) in enumerate(parts, start=1)
    ]


def evaluation_shares(num_samples: int, *, batch_size: int, world: World) -> list[Share]:
    """One worker's run of the batches of a split; every worker has as many, of which some may be borrowed."""
    batches = torch.split(torch.arange(num_samples), batch_size)
    runs = split_evenly(len(batches), world.size)
    start = sum(runs[: world.rank])
    mine = [Share(batch, len(batch), 1.0, ends_step=True) for batch in batches[start : start + runs[world.rank]]]
    borrowed = Share(batches[-1][-1:], 0, 1.0, ends_step=True)
    return mine + [borrowed] * (runs[0] - len(mine))


def evaluation_counts(num_samples: int, *, batch_size: int, num_workers: int) -> list[int]:
    """How many samples of a split each worker evaluates."""
    worlds = (World(rank, num_workers) for rank in range(num_workers))
    shares = (evaluation_shares(num_samples, batch_size=batch_size, world=world) for world in worlds)
    return [sum(share.num_samples for share in mine) for mine in shares]


def counts_of(num_samples: int, num_workers: int, min_rows: int) -> list[int]:
    """How many of a batch's samples each worker has: evenly, but `min_rows` or none as far as there are as many."""
    having = max(1, min(num_workers, num_samples // min_rows))
    return split_evenly(num_samples, having) + [0] * (num_workers - having)


def _part_of(indices: Tensor, world: World, min_rows: int = 1) -> tuple[Tensor, int]:
    """This worker's part of the indices and how many of them count; borrowed indices, and 0, where there are none."""
    counts = counts_of(len(indices), world.size, min_rows)
    start = sum(counts[: world.rank])
    mine = indices[start : start + counts[world.rank]]
    return (mine, len(mine)) if len(mine) else (indices[-min_rows:], 0)


def load_batches(
    dataset: Dataset[Any], shares: Sequence[Share], *, device: torch.device
) -> Iterator[tuple[Share, Batch]]:
    """Each share with its batch on the device. Raises StageError when a sample is not a tuple."""
    whole = whole_tensors(dataset)
    batches: Iterable[Batch]
    if whole is None:
        # A generator of its own: a DataLoader would draw from the global one, and shift the dropout masks after it.
        indices = [share.indices.tolist() for share in shares]
        loader = DataLoader(dataset, batch_sampler=indices, generator=torch.Generator(), collate_fn=collate)
        batches = (_as_tuple(batch) for batch in loader)
    else:
        tensors, index_map = whole
        rows = (s.indices if index_map is None else index_map[s.indices] for s in shares)
        batches = (tuple(tensor.index_select(0, row) for tensor in tensors) for row in rows)
    for share, batch in zip(shares, batches):
        yield share, tuple(item.to(device) if isinstance(item, Tensor) else item for item in batch)


def epoch_batches(
    dataset: Dataset[Any],
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    world: World,
    device: torch.device,
    accumulate_steps: int = 1,
    max_steps: int | None = None,
    min_rows: int = 1,
) -> Iterator[tuple[Share, Batch]]:
    """One worker's shares of an epoch with their batches: of a permutation, or of a stream in its own order.

    No share has fewer than `min_rows` samples, unless the data has: what would is merged with its neighbour.
    """
    if isinstance(dataset, IterableDataset):
        pairs = _stream_batches(
            dataset, batch_size, world=world, device=device, accumulate_steps=accumulate_steps, min_rows=min_rows
        )
    else:
        shares = training_shares(
            len(dataset),  # type: ignore[arg-type]
            batch_size=batch_size,
            seed=seed,
            epoch=epoch,
            world=world,
            accumulate_steps=accumulate_steps,
            min_rows=min_rows,
        )
        pairs = load_batches(dataset, shares, device=device)
    steps = 0
    for share, batch in pairs:
        yield share, batch
        steps += share.ends_step
        if steps == max_steps:
            return


def first_sample(dataset: Dataset[Any], device: torch.device) -> Batch:
    """A batch of one sample, which need not be the first of the data."""
    batches = epoch_batches(dataset, batch_size=1, seed=0, epoch=0, world=World(), device=device, max_steps=1)
    ((_, batch),) = batches
    return batch


def first_rows(dataset: Dataset[Any], count: int, *, device: torch.device | None = None) -> Batch:
    """The first `count` samples, in their order, as one batch; all of them, if there are fewer."""
    device = device or torch.device("cpu")
    if isinstance(dataset, IterableDataset):
        batches = _stream_batches(dataset, count, world=World(), device=device, accumulate_steps=1, min_rows=1)
    else:
        rows = torch.arange(min(count, len(dataset)))  # type: ignore[arg-type]
        batches = load_batches(dataset, [Share(rows, len(rows), weight=1.0, ends_step=True)], device=device)
    for _, batch in batches:
        return batch
    raise StageError("the training data gave no sample; a stream must start anew each time it is iterated over")


def num_steps(dataset: Dataset[Any], batch_size: int, *, min_rows: int = 1) -> int | None:
    """The global batches of an epoch; None for a stream, whose length nobody knows."""
    if isinstance(dataset, IterableDataset):
        return None
    whole, rest = divmod(len(dataset), batch_size)  # type: ignore[arg-type]
    return max(1, whole + (rest >= min_rows)) if rest else whole


def _stream_batches(
    dataset: IterableDataset[Any],
    batch_size: int,
    *,
    world: World,
    device: torch.device,
    accumulate_steps: int,
    min_rows: int,
) -> Iterator[tuple[Share, Batch]]:
    """Every worker reads the whole stream, which must be the same for all, and takes its part of each global batch."""
    stream = iter(dataset)
    while samples := list(islice(stream, batch_size)):
        if min_rows > 1 and len(samples) == batch_size:
            following = list(islice(stream, min_rows))
            if len(following) < min_rows:
                samples += following
            else:
                stream = chain(following, stream)
        indices = torch.arange(len(samples))
        for share in shares_of(indices, world=world, accumulate_steps=accumulate_steps, min_rows=min_rows):
            batch = _as_tuple(collate([samples[index] for index in share.indices.tolist()]))
            yield share, tuple(item.to(device) if isinstance(item, Tensor) else item for item in batch)


def _as_tuple(batch: Any) -> Batch:
    if not isinstance(batch, (tuple, list)):
        raise StageError(
            f"a sample must be a tuple (inputs, targets, ...), but the dataset gives {type(batch).__name__}"
        )
    return tuple(batch)


def whole_tensors(dataset: Dataset[Any]) -> tuple[tuple[Tensor, ...], Tensor | None] | None:
    """The tensors below a dataset and which of their rows it consists of (None is all), or None when there are none.

    Subclasses are left alone: they may compute their samples.
    """
    if type(dataset) is TensorDataset:
        return dataset.tensors, None
    if type(dataset) is Subset and (inner := whole_tensors(dataset.dataset)) is not None:
        tensors, index_map = inner
        indices = torch.as_tensor(dataset.indices)
        return tensors, indices if index_map is None else index_map[indices]
    return None
