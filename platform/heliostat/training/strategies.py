"""How a model is spread over workers: one plain function `(model, world) -> model` for each strategy.

Under any strategy the loop sees a module whose gradients after `backward` are the mean over workers. Its `state_dict`
has the names of the user's model, so that what is saved does not tell how it was trained.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from heliostat.errors import SpecError, StageError
from heliostat.training.world import World

Strategy = Callable[[nn.Module, World], nn.Module]


def single(model: nn.Module, world: World) -> nn.Module:
    """The model itself, on one worker's device."""
    if world.size > 1:
        raise SpecError(f"strategy 'single' trains with one worker, not {world.size}; take 'ddp' or 'auto'")
    return model.to(world.device)


class _PlainNamesDDP(DistributedDataParallel):
    """DDP whose weights keep the names of the module inside, where DDP's own start with `module.`."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        return self.module.load_state_dict(state_dict, strict=strict, assign=assign)


def ddp(model: nn.Module, world: World) -> nn.Module:
    """Data parallel: a whole copy on every worker, gradients averaged while `backward` runs. One worker needs no copy.

    Gradients live in the communication buckets, which saves a copy of each. Unused parameters are not looked for at
    every step, which is slow, and the graph is not assumed static, which is silently wrong for a model that branches.
    """
    if world.size == 1:
        return single(model, world)
    device_ids = None if world.device.type == "cpu" else [world.device]
    return _PlainNamesDDP(model.to(world.device), device_ids=device_ids, gradient_as_bucket_view=True)


STRATEGIES: dict[str, Strategy] = {"single": single, "ddp": ddp}


def parallelize(model: nn.Module, strategy: str, world: World) -> nn.Module:
    """Apply a strategy by name; `auto` is `single` for one worker and `ddp` for several."""
    name = ("single" if world.size == 1 else "ddp") if strategy == "auto" else strategy
    return STRATEGIES[name](model, world)


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def no_gradient_sync(model: nn.Module) -> AbstractContextManager[None]:
    """Within it `backward` only accumulates; the workers' gradients are averaged by the first `backward` after it."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def require_all_used(model: nn.Module) -> None:
    """Raise StageError for parameters that `backward` left without a gradient: the workers would wait for one."""
    if isinstance(model, DistributedDataParallel):
        unused = [name for name, p in model.module.named_parameters() if p.requires_grad and p.grad is None]
        if unused:
            raise StageError(
                f"the loss does not depend on {', '.join(unused)}; ddp needs every parameter's gradient: "
                "remove them, or freeze them with requires_grad_(False)"
            )
