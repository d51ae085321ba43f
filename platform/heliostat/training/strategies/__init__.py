"""How a model is spread over workers: one plain function `(model, …, world) -> Parallel` for each strategy.

A strategy is imported when it is used: torch's distributed modules take a second.
"""

from collections.abc import Callable

from torch import Tensor, nn

from heliostat.training.config import StrategyConfig
from heliostat.training.strategies.parallel import Parallel
from heliostat.training.world import World

__all__ = ["Parallel", "parallelize"]


def parallelize(
    model: nn.Module, strategy: StrategyConfig, world: World, *, batch_size: int, example: Callable[[], Tensor]
) -> Parallel:
    """Apply a strategy other than `auto`, which `choose_strategy` resolves.

    `batch_size` is global; `example` gives the inputs of a batch of one sample.
    """
    match strategy.name:
        case "fsdp":
            from heliostat.training.strategies.fsdp import fsdp

            return fsdp(model, strategy.fsdp, world)
        case "tp":
            from heliostat.training.strategies.tp import tp

            return tp(model, strategy.tp, world, strategy.sizes(world.size))
        case "pp":
            from heliostat.training.strategies.pp import pp

            sizes = strategy.sizes(world.size)
            return pp(model, strategy.pp, world, sizes, batch_size=batch_size, example=example)
        case "single":
            from heliostat.training.strategies.replicated import single

            return single(model, world)
        case _:
            from heliostat.training.strategies.replicated import ddp

            return ddp(model, world)
