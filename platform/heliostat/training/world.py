"""Where a worker stands among the workers of one training run, and the few collectives that the loop needs.

The process group is the caller's: with `size` > 1 it is already initialised. With one worker every function here is the
identity, so that the callers read the same for any number of workers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

GATHERED_BYTES = 256_000_000
"""What the rows of all workers, on their way to each, may take of a device."""


@dataclass(frozen=True)
class World:
    """One worker among others: its rank, their number, its device, and their process group if that is not everyone."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: "dist.ProcessGroup | None" = field(default=None, compare=False, repr=False)


def sum_over_workers(values: Tensor, *, world: World) -> Tensor:
    """The elementwise sum of every worker's `values`, on every worker."""
    if world.size > 1:
        values = values.clone()
        dist.all_reduce(values, group=world.group)
    return values


def any_worker(flag: bool, *, world: World) -> bool:
    """Whether any worker's `flag` is set. All workers get the same answer."""
    return bool(sum_over_workers(torch.tensor(float(flag), device=world.device), world=world))


def from_first_worker(value: Any, *, world: World) -> Any:
    """The value of rank 0, on every worker."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, group=world.group, group_src=0)
    return box[0]


def from_worker(rank: int, value: Any, *, world: World) -> Any:
    """The value of the worker with that rank, on every worker of this world."""
    box = [value]
    dist.broadcast_object_list(box, group=world.group, group_src=rank, device=torch.device("cpu"))
    return box[0].to(world.device) if isinstance(box[0], Tensor) else box[0]


def gather_rows(rows: Tensor, counts: Sequence[int], *, world: World) -> Tensor:
    """Every worker's rows, in order of rank, on every worker; worker r has `counts[r]` of them.

    They go over the workers' devices, on each of which only some lie at once.
    """
    if world.size == 1:
        return rows
    row_bytes = rows.element_size() * math.prod(rows.shape[1:])
    size = max(1, GATHERED_BYTES // max(1, row_bytes * world.size))
    parts: list[list[Tensor]] = [[] for _ in counts]
    for start in range(0, max(counts), size):
        padded = rows.new_zeros((min(size, max(counts) - start), *rows.shape[1:]), device=world.device)
        mine = rows[start : start + size]
        padded[: len(mine)] = mine
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded, group=world.group)
        for part, found, count in zip(parts, gathered, counts):
            part.append(found[: max(0, count - start)].to(rows.device))
    return torch.cat([rows for part in parts for rows in part])


def copy_buffers_from_first(model: nn.Module, *, world: World) -> None:
    """Give every worker rank 0's buffers.

    Statistics such as BatchNorm's drift apart between workers within a step. What is evaluated must be what is saved.
    """
    if world.size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, group=world.group, group_src=0)
