"""A whole copy of the model on every worker: `single` and `ddp`."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from heliostat.errors import SpecError, StageError
from heliostat.training.strategies.parallel import Parallel, whole_model
from heliostat.training.world import World


def single(model: nn.Module, world: World) -> Parallel:
    """The model itself, on one worker's device."""
    if world.size > 1:
        raise SpecError(f"strategy 'single' trains with one worker, not {world.size}; take 'ddp' or 'auto'")
    return whole_model(model.to(world.device), world=world)


class _PlainNamesDDP(DistributedDataParallel):
    """DDP whose weights keep the names of the module inside, where DDP's own start with `module.`."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        return self.module.load_state_dict(state_dict, strict=strict, assign=assign)


def replicate(model: nn.Module, world: World) -> nn.Module:
    """The model whose gradients after `backward` are the mean over workers, averaged while `backward` runs.

    Gradients live in the communication buckets, which saves a copy of each. Unused parameters are not looked for at
    every step, which is slow, and the graph is not assumed static, which is silently wrong for a model that branches.
    One worker needs no copy.
    """
    model = model.to(world.device)
    if world.size == 1:
        return model
    device_ids = None if world.device.type == "cpu" else [world.device]
    return _PlainNamesDDP(model, device_ids=device_ids, gradient_as_bucket_view=True)


def ddp(model: nn.Module, world: World) -> Parallel:
    """Data parallel: a whole copy on every worker."""
    if world.size == 1:
        return single(model, world)
    copy = replicate(model, world)
    return whole_model(model, called=copy, world=world, after_first_step=lambda: _require_all_used(model))


def _require_all_used(model: nn.Module) -> None:
    """Raise StageError for parameters that `backward` left without a gradient: the workers would wait for one."""
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if unused:
        raise StageError(
            f"the loss does not depend on {', '.join(unused)}; ddp needs every parameter's gradient: "
            "remove them, or freeze them with requires_grad_(False)"
        )
