"""A model spread over workers, as the loop sees it under any strategy.

After `backward` and `end_backward` the gradients of `module` are those of the mean loss over the global batch. Its
state has the names of the user's model, so that what is saved does not tell how it was trained.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from heliostat.training.batches import Batch, Share
from heliostat.training.losses import LossRule
from heliostat.training.world import World


def _nothing() -> None: ...


@dataclass(frozen=True)
class Parallel:
    """What a strategy makes of a model. Every worker calls each function at the same point."""

    module: nn.Module
    """What holds this worker's parameters: the user's own module, or its part of it."""
    outputs: Callable[[Tensor], Tensor]
    """The model's outputs for a batch, without gradients for them."""
    backward: Callable[[Batch, Share, LossRule], Tensor]
    """Adds a share's part of the gradient; returns the mean loss over the share."""
    world: World
    data: World
    """The workers that share each global batch, each computing its own part of it."""
    end_backward: Callable[[], None] = _nothing
    """Called when the global batch is complete, before the gradients are looked at."""
    after_first_step: Callable[[], None] = _nothing
    """Called with the first gradients of an epoch; raises StageError for a model that the strategy cannot train."""


def whole_model(
    module: nn.Module,
    *,
    world: World,
    called: nn.Module | None = None,
    after_first_step: Callable[[], None] = _nothing,
) -> Parallel:
    """A model that every worker calls with its own part of a batch; `called` is the wrapper around it, if any."""
    model = called or module

    def backward(batch: Batch, share: Share, rule: LossRule) -> Tensor:
        with _gradient_sync(model, enabled=share.ends_step):
            loss = rule.loss(model, batch)
            rule.backward(loss if share.weight == 1.0 else loss * share.weight)
        return loss.detach()

    return Parallel(module, module, backward, world=world, data=world, after_first_step=after_first_step)


def _gradient_sync(model: nn.Module, *, enabled: bool) -> AbstractContextManager[None]:
    """Without it `backward` only accumulates; the workers' gradients are averaged by the next `backward` with it."""
    return nullcontext() if enabled or not isinstance(model, DistributedDataParallel) else model.no_sync()
