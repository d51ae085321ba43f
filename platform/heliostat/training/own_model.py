"""A model spread over workers for the user's own loop, which makes the optimizer, calls `backward` and saves by itself.

What our loop does between those steps is done here by hooks of torch: whole tensors that are loaded into the model or
the optimizer are spread as the parameters are, and gradients are averaged as `backward` gives them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from heliostat.core.state import map_tensors
from heliostat.errors import StageError
from heliostat.training.config import StrategyConfig, TpConfig, TrainConfig
from heliostat.training.strategies import parallelize
from heliostat.training.strategies.auto import choose_for_own_loop
from heliostat.training.strategies.choice import Choice
from heliostat.training.strategies.gradients import is_spread, local, whole
from heliostat.training.strategies.replicated import replicate
from heliostat.training.world import World

Stale = Mapping[int, "ref[nn.Parameter]"]


@dataclass(frozen=True)
class OwnModel:
    """A model as the user's loop gets it."""

    module: nn.Module
    """The one to call."""
    data: World
    """The workers that share each batch."""
    undo: Callable[[], None] = lambda: None
    """Takes the hooks away when the loop is over."""
    choice: Choice | None = None
    """What `auto` took."""


def spread_for_own_loop(model: nn.Module, config: TrainConfig, world: World) -> OwnModel:
    """Apply the config's strategy, or the one that `auto` takes for the model."""
    choice, strategy = None, config.strategy
    if strategy.name == "auto":
        choice = choose_for_own_loop(model, config, world)
        strategy = choice.strategy
    if strategy.is_replicated:
        return OwnModel(replicate(model, world), world, choice=choice)
    before = list(model.parameters())
    if strategy.name == "tp":
        strategy = _with_plain_names(model, strategy, world.size)
    parallel = parallelize(model, strategy, world, batch_size=config.batch_size, example=_no_example)
    kept = {id(parameter) for parameter in model.parameters()}
    stale = {id(parameter): ref(parameter) for parameter in before if id(parameter) not in kept}
    model.register_load_state_dict_pre_hook(_spread_loaded_weights)  # type: ignore[no-untyped-call]
    if strategy.name == "tp" and parallel.data.size > 1:
        for parameter in model.parameters():
            if parameter.requires_grad:
                average = partial(_average_gradient, parallel.data)
                parameter.register_post_accumulate_grad_hook(average)  # type: ignore[no-untyped-call]
    handle = register_optimizer_step_pre_hook(partial(_before_step, stale))
    return OwnModel(parallel.module, parallel.data, handle.remove, choice)


def _with_plain_names(model: nn.Module, strategy: StrategyConfig, workers: int) -> StrategyConfig:
    """The strategy with a plan that leaves alone what would give a weight another shape than the user's model has."""
    from heliostat.training.strategies.tp import tp_plan

    plan = tp_plan(model, strategy.tp, strategy.sizes(workers)["tp"])
    kept = {name: style for name, style in plan.items() if style != "heads"}
    return strategy.model_copy(update={"tp": TpConfig(plan=kept)})


def whole_checkpoint(value: Any) -> Any:
    """A checkpoint with what is spread over workers made whole, on CPU; the rest as it is. Every worker calls it."""
    return map_tensors(value, lambda tensor: whole(tensor.detach()).cpu() if is_spread(tensor) else tensor)


def _no_example() -> Tensor:
    raise AssertionError("only pp looks at an example, and no own loop can train under pp")


def _spread_loaded_weights(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, tensor in model.state_dict(keep_vars=True).items():
        if prefix + name in state:
            state[prefix + name] = _spread_as(tensor, state[prefix + name])


def _before_step(stale: Stale, optimizer: Optimizer, *_: Any) -> None:
    """Refuse an optimizer of what the model no longer consists of, and spread the state that was loaded into one."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in stale and stale[id(parameter)]() is parameter:
                raise StageError(
                    "context.prepare: fsdp and tp give the model new parameters; make the optimizer after it, of "
                    "the model that it returns"
                )
            kept = optimizer.state.get(parameter, {})
            for name, value in kept.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    kept[name] = _spread_as(parameter, value)


def _spread_as(parameter: Any, value: Any) -> Any:
    """A whole tensor, the same on all workers, in the parts that a parameter has; anything else as it is."""
    if not is_spread(parameter) or is_spread(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


@torch.no_grad()
def _average_gradient(data: World, parameter: Tensor) -> None:
    """The mean over the groups of workers. What was averaged before stays the same when more is added to it."""
    assert parameter.grad is not None
    gradient = local(parameter.grad)
    dist.all_reduce(gradient, group=data.group)
    gradient /= data.size
