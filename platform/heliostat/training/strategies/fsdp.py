"""`fsdp`: parameters, gradients and optimizer state sharded over the workers (FSDP2, `fully_shard`).

The model is cut into units that are gathered one at a time: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from collections.abc import Iterator

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from heliostat.errors import SpecError, nearest
from heliostat.training.batches import Batch, Share
from heliostat.training.config import FsdpConfig
from heliostat.training.losses import LossRule, LossSum
from heliostat.training.strategies.parallel import Parallel, copy_of_part, whole_on_cpu
from heliostat.training.world import World


def fsdp(model: nn.Module, config: FsdpConfig, world: World) -> Parallel:
    """Shard the model. Between uses a worker holds 1/N of every tensor; a unit is whole only while it computes."""
    mesh = init_device_mesh(world.device.type, (world.size,))
    model.to(world.device)
    for unit in list(units(model, config.wrap)):
        fully_shard(unit, mesh=mesh)
    sharded: FSDPModule = fully_shard(model, mesh=mesh, reshard_after_forward=True)

    def backward(batch: Batch, share: Share, rule: LossRule) -> LossSum:
        sharded.set_requires_gradient_sync(share.ends_step)
        return rule.backward(rule.loss(model, batch), share)

    return Parallel(
        model, model, backward, world=world, data=world, is_sharded=True, keep=copy_of_part, gather=whole_on_cpu
    )


def units(model: nn.Module, wrap: str | int) -> Iterator[nn.Module]:
    """The modules that are gathered as one: those of a class, or the smallest ones with so many parameters.

    Raises SpecError when the model has no module of the class.
    """
    if isinstance(wrap, str):
        found = [module for module in model.modules() if type(module).__name__ == wrap and module is not model]
        if not found:
            known = {type(module).__name__ for module in model.modules()}
            raise SpecError(f"strategy.fsdp.wrap: the model has no {wrap!r}{nearest(wrap, known)}")
        yield from found
        return
    for child in model.children():
        inside = list(units(child, wrap))
        yield from inside
        covered = {id(p) for unit in inside for p in unit.parameters()}
        if sum(p.numel() for p in child.parameters() if id(p) not in covered) >= wrap and _is_called(child):
            yield child


def _is_called(module: nn.Module) -> bool:
    """Containers such as ModuleList have no forward pass in which a unit could be gathered."""
    return not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict)
