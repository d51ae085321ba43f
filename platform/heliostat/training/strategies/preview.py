"""What a strategy will do with a model, before anything runs: it is made without weights, on torch's meta device."""

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from heliostat.training.config import TrainConfig
from heliostat.training.strategies.forecast import on_meta
from heliostat.training.strategies.fsdp import units
from heliostat.training.strategies.pp import cut_points, links
from heliostat.training.strategies.tp import left_whole, tp_plan


def num_parameters(module: nn.Module) -> int:
    """How many numbers the module learns or keeps frozen."""
    return sum(parameter.numel() for parameter in module.parameters())


def preview(build_model: Callable[..., Any], config: TrainConfig, *, workers: int) -> str:
    """The layers that `tp` splits, the modules that `pp` begins each stage with, or the units that `fsdp` gathers."""
    strategy = config.strategy
    model = on_meta(build_model, config)
    if isinstance(model, str):
        return f"{strategy.name}; the layers are {model}"
    match strategy.name:
        case "tp":
            plan = tp_plan(model, strategy.tp, strategy.sizes(workers)["tp"])
            split = ", ".join(_alike(f"{name} {style}" for name, style in plan.items()))
            whole = ", ".join(_alike(left_whole(model, plan)))
            return f"tp: {split}" + (f"; whole on every worker: {whole}" if whole else "")
        case "pp":
            num_stages = strategy.sizes(workers)["pp"] * strategy.pp.stages_per_worker
            chain = list(links("", model))
            cuts = cut_points(chain, strategy.pp, num_stages=num_stages)
            counts = [sum(num_parameters(module) for _, module in chain[start:stop]) for start, stop in cuts]
            starts = [chain[start][0] for start, _ in cuts]
            return "pp: " + ", ".join(f"from {name} {count:,} parameters" for name, count in zip(starts, counts))
        case _:
            return f"fsdp: {len(list(units(model, strategy.fsdp.wrap)))} units and the rest, over {workers} workers"


def _alike(names: Iterable[str]) -> list[str]:
    """Each once, with the same layer of every block as one: `blocks.*.fc1`."""
    parts = [name.split(" ") for name in names]
    found = (" ".join([re.sub(r"(?<=[A-Za-z_]\.)\d+(?=\.)", "*", name), *style]) for name, *style in parts)
    return list(dict.fromkeys(found))
