"""A model spread over workers, as the loop sees it under any strategy.

After `backward` and `end_backward` the gradients of `module` are those of the mean loss over the global batch. Its
state has the names of the user's model, so that what is saved does not tell how it was trained.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from heliostat.core.state import map_state, with_metadata_of
from heliostat.training.batches import Batch, Share
from heliostat.training.losses import LossRule, LossSum
from heliostat.training.strategies.gradients import whole
from heliostat.training.world import World

Weights = OrderedDict[str, Tensor]
"""A state dict, or a part of one, with its `_metadata`; what `get_extra_state` gave is among the tensors."""


def _nothing() -> None: ...


def copy_on_cpu(weights: Mapping[str, Tensor]) -> Weights:
    """A state's own copy on CPU, in plain layout, which further training does not change."""
    return map_state(weights, lambda tensor: tensor.detach().to("cpu", copy=True).contiguous())


def copy_of_part(weights: Mapping[str, Tensor]) -> Weights:
    """A copy of this worker's part of a state, where that is."""
    return map_state(weights, lambda tensor: tensor.detach().clone())


def whole_on_cpu(weights: Mapping[str, Tensor]) -> Weights:
    """The whole of a state that is spread over workers, on every worker, which must all call it."""
    return map_state(weights, lambda tensor: whole(tensor).to("cpu"))


def as_it_is(weights: Weights) -> Weights:
    """The same state, in a mapping of its own."""
    return with_metadata_of(weights, weights)


@dataclass(frozen=True)
class Parallel:
    """What a strategy makes of a model. Every worker calls each function at the same point."""

    module: nn.Module
    """What holds this worker's parameters: the user's own module, or its part of it."""
    outputs: Callable[[Tensor], Tensor]
    """The model's outputs for a batch, without gradients for them."""
    backward: Callable[[Batch, Share, LossRule], LossSum]
    """Adds a share's part of the gradient; returns the share's loss."""
    world: World
    data: World
    """The workers that share each global batch, each computing its own part of it."""
    end_backward: Callable[[], None] = _nothing
    """Called when the global batch is complete, before the gradients are looked at."""
    after_first_step: Callable[[], None] = _nothing
    """Called with the first gradients of an epoch; raises StageError for a model that the strategy cannot train."""
    stages: World = field(default_factory=World)
    """The workers that have further parts of the model, of which this one knows nothing."""
    is_sharded: bool = False
    """Whether a worker holds only a part of the state."""
    keep: Callable[[Mapping[str, Tensor]], Weights] = copy_on_cpu
    """A copy of the module's state."""
    gather: Callable[[Weights], Weights] = as_it_is
    """From such a copy to the state of the user's whole model, on CPU."""


def whole_model(
    module: nn.Module,
    *,
    world: World,
    called: nn.Module | None = None,
    after_first_step: Callable[[], None] = _nothing,
) -> Parallel:
    """A model that every worker calls with its own part of a batch; `called` is the wrapper around it, if any."""
    model = called or module

    def backward(batch: Batch, share: Share, rule: LossRule) -> LossSum:
        with _gradient_sync(model, enabled=share.ends_step):
            return rule.backward(rule.loss(model, batch), share)

    return Parallel(module, module, backward, world=world, data=world, after_first_step=after_first_step)


def _gradient_sync(model: nn.Module, *, enabled: bool) -> AbstractContextManager[None]:
    """Without it `backward` only accumulates; the workers' gradients are averaged by the next `backward` with it."""
    return nullcontext() if enabled or not isinstance(model, DistributedDataParallel) else model.no_sync()
