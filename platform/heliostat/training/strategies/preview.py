"""What a strategy will do with a model, before anything runs: it is made without weights, on torch's meta device."""

from collections.abc import Callable
from typing import Any

from torch import nn

from heliostat.training.config import TrainConfig
from heliostat.training.strategies.forecast import on_meta
from heliostat.training.strategies.fsdp import units
from heliostat.training.strategies.pp import cut_points, links
from heliostat.training.strategies.tp import auto_plan, named_layers


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
            size = strategy.sizes(workers)["tp"]
            plan = auto_plan(model, size) if strategy.tp.plan == "auto" else named_layers(model, strategy.tp.plan)
            return "tp: " + ", ".join(f"{name} {style}" for name, style in plan.items())
        case "pp":
            num_stages = strategy.sizes(workers)["pp"] * strategy.pp.stages_per_worker
            chain = list(links("", model))
            cuts = cut_points(chain, strategy.pp, num_stages=num_stages)
            counts = [sum(num_parameters(module) for _, module in chain[start:stop]) for start, stop in cuts]
            starts = [chain[start][0] for start, _ in cuts]
            return "pp: " + ", ".join(f"from {name} {count:,} parameters" for name, count in zip(starts, counts))
        case _:
            return f"fsdp: {len(list(units(model, strategy.fsdp.wrap)))} units and the rest, over {workers} workers"
