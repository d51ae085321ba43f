"""How a model is spread over workers: one plain function `(model, world) -> Parallel` for each strategy."""

from collections.abc import Callable

from torch import nn

from heliostat.training.strategies.parallel import Parallel
from heliostat.training.strategies.replicated import ddp, single
from heliostat.training.world import World

__all__ = ["Parallel", "parallelize"]

STRATEGIES: dict[str, Callable[[nn.Module, World], Parallel]] = {"single": single, "ddp": ddp}


def parallelize(model: nn.Module, strategy: str, world: World) -> Parallel:
    """Apply a strategy by name; `auto` is `single` for one worker and `ddp` for several."""
    name = ("single" if world.size == 1 else "ddp") if strategy == "auto" else strategy
    return STRATEGIES[name](model, world)
