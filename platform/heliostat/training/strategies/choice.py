"""What `auto` takes: by the memory that each strategy needs of a worker, and how the workers' devices are linked.

Data parallel where the whole model fits on each device. Where it does not and all workers are on one node: `fsdp`,
then `tp` if a single layer is too large to be gathered, then `pp`. Between nodes links are few and slow, and `fsdp`
would send every parameter over them three times a step: there `tp` works inside the nodes, or `pp` across them, and
`fsdp` comes last.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from typing import Any

from heliostat.training.config import StrategyConfig
from heliostat.training.devices import Device
from heliostat.training.memory import Estimate, Memory, Parts

USABLE = 0.8
"""The part of a device's memory that is planned with: the rest is the runtime's, the allocator's and the data's."""


@dataclass(frozen=True)
class Choice:
    """A strategy, why it was taken, and what a worker holds under it and under the others that were weighed."""

    strategy: StrategyConfig
    reason: str
    memory: Mapping[str, Memory] = field(default_factory=dict)
    device_bytes: int = 0

    @property
    def mesh(self) -> str:
        """`fsdp`, or `dp 2 x tp 4`."""
        axes = [f"{axis} {size}" for axis, size in self.strategy.mesh.items()]
        return " x ".join(axes) or self.strategy.name

    def record(self) -> dict[str, Any]:
        """As JSON values: the strategy, and a row of megabytes for each that was weighed."""
        taken: dict[str, Any] = {"taken": self.mesh, "reason": self.reason}
        if not self.memory:
            return {"strategy": taken}
        taken["device_mb"] = _mb(self.device_bytes)
        rows = [
            {"strategy": name, **{f"{part}_mb": _mb(held) for part, held in asdict(memory).items()}}
            | {"total_mb": _mb(memory.total)}
            for name, memory in self.memory.items()
        ]
        return {"strategy": taken, "memory": rows}

    def table(self) -> str:
        """The memory of a worker under each strategy that was weighed, a line each."""
        names = [*asdict(next(iter(self.memory.values()))), "total"]
        cells = [["", *names]]
        for name, memory in self.memory.items():
            held = [*asdict(memory).values(), memory.total]
            cells.append([name, *("not known" if value is None else size(value) for value in held)])
        widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
        return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in cells)


def fits_whole(estimate: Estimate, devices: Sequence[Device], share: int) -> bool:
    """Whether each device holds the whole model in training, and `share` samples at once."""
    return estimate.replicated(share, on_cpu=devices[0].is_cpu).total <= _room(devices)


def choose(
    estimate: Estimate,
    devices: Sequence[Device],
    *,
    batch_size: int,
    accumulate_steps: int = 1,
    parts: Parts | None = None,
    refused: Mapping[str, str] | None = None,
) -> Choice:
    """The strategy for these devices, in order of rank, and this global batch.

    `parts` may be left out where `fits_whole`; `refused` says of `fsdp`, `tp` and `pp` why the model, the task or the
    config does not allow it.
    """
    room, workers = _room(devices), len(devices)
    share = share_of(batch_size, workers, accumulate_steps)
    whole = estimate.replicated(share, on_cpu=devices[0].is_cpu)
    memory = {"ddp": whole}
    device_bytes = min(device.memory_bytes for device in devices)
    if workers == 1 or whole.total <= room or parts is None:
        name = "ddp" if workers > 1 else "single"
        reason = f"a whole copy takes {size(whole.total)} of a device's {size(device_bytes)}"
        return Choice(StrategyConfig(name=name), reason, {name: whole}, device_bytes)

    refused = refused or {}
    tried = [f"a whole copy takes {size(whole.total)} of a device's {size(device_bytes)}"]
    if len({device.node for device in devices}) > 1:
        tried.append("links between nodes are slow")
    candidates: list[StrategyConfig] = []
    for strategy in _in_order(devices):
        why_not = refused.get(strategy.name)
        if why_not is not None:
            tried.append(f"{strategy.name} is not possible ({why_not})")
            continue
        held = _held(estimate, strategy, parts, workers, batch_size, accumulate_steps)
        choice = Choice(strategy, "", memory, device_bytes)
        memory[choice.mesh] = held
        candidates.append(strategy)
        if held.total <= room:
            reason = "; ".join([*tried, f"with {choice.mesh} it is {size(held.total)} a worker"])
            return replace(choice, reason=reason)
        tried.append(f"{choice.mesh} takes {size(held.total)}{_gathered(strategy, parts)}")
    least = min([StrategyConfig(name="ddp"), *candidates], key=lambda strategy: memory[Choice(strategy, "").mesh].total)
    reason = "; ".join([*tried, "nothing fits, and this is the least: take more workers, or a smaller batch_size"])
    return Choice(least, reason, memory, device_bytes)


def share_of(batch_size: int, groups: int, accumulate_steps: int) -> int:
    """The samples that a worker computes at once."""
    return math.ceil(math.ceil(batch_size / groups) / accumulate_steps)


def size(num_bytes: int) -> str:
    """`340 MB`, `1.6 GB`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {unit}"
    return f"{num_bytes / 1e3:.3g} KB"


def _mb(num_bytes: int | None) -> float | None:
    return None if num_bytes is None else round(num_bytes / 1e6, 1)


def _room(devices: Sequence[Device]) -> float:
    return USABLE * min(device.memory_bytes for device in devices)


def _in_order(devices: Sequence[Device]) -> Iterator[StrategyConfig]:
    """What may hold a model that fits on no device, the best for these links first."""
    on_nodes = [len(list(group)) for _, group in groupby(device.node for device in devices)]
    if len(on_nodes) == 1:
        yield from (StrategyConfig(name=name) for name in ("fsdp", "tp", "pp"))
        return
    if on_nodes[0] > 1 and len(set(on_nodes)) == 1:
        yield StrategyConfig(name="tp", mesh={"dp": len(on_nodes), "tp": on_nodes[0]})
    yield from (StrategyConfig(name=name) for name in ("pp", "fsdp"))


def _held(
    estimate: Estimate, strategy: StrategyConfig, parts: Parts, workers: int, batch_size: int, accumulate_steps: int
) -> Memory:
    """What a worker holds under a strategy. Between the layers that `tp` splits, activations are whole."""
    if strategy.name == "fsdp":
        share = share_of(batch_size, workers, accumulate_steps)
        return estimate.sharded(share, workers=workers, largest_unit=parts.largest_unit)
    sizes = strategy.sizes(workers)
    share = share_of(batch_size, sizes["dp"], accumulate_steps)
    if strategy.name == "tp":
        saved = parts.split / estimate.parameters * (1 - 1 / sizes["tp"])
        return estimate.divided(share, part=1 - saved)
    return estimate.divided(share, part=parts.largest_stage / estimate.parameters, of_activations=1 / sizes["pp"])


def _gathered(strategy: StrategyConfig, parts: Parts) -> str:
    if strategy.name != "fsdp":
        return ""
    return f", of which its largest unit alone, gathered, {size(3 * parts.largest_unit)}"
