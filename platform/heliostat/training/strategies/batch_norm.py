"""Batch norm whose statistics are of all workers' samples, as one worker with the whole batch would have them.

In training `torch.nn.functional.batch_norm`, which torch's modules and those derived from them call, is replaced by a
function that combines mean and variance of all workers (Chan et al. 1979), forward and backward. The modules stay what
they are, and so does what is saved. Torch's `SyncBatchNorm` takes no CPU tensors, and no samples of weight 0.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from heliostat.training.world import World, sum_over_workers

Sizes = tuple[int, ...]


@contextmanager
def synced_batch_norm(world: World, *, counts: bool) -> Iterator[None]:
    """Within it batch norm in training is over the workers. `counts` says whether this worker's samples do."""
    if world.size == 1:
        yield
        return
    own = functional.batch_norm

    def over_workers(
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return own(input, running_mean, running_var, weight, bias, training, momentum, eps)
        normed: Tensor = _BatchNorm.apply(input, weight, bias, running_mean, running_var, momentum, eps, world, counts)  # type: ignore[no-untyped-call]
        return normed

    functional.batch_norm = over_workers
    try:
        yield
    finally:
        functional.batch_norm = own


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        world: World,
        counts: bool,
    ) -> Tensor:
        dims, shape = _layout(inputs)
        var, mean = torch.var_mean(inputs.float(), dims, correction=0)
        own = torch.stack([torch.full_like(mean, inputs.numel() / len(mean)), mean, var]).double() * counts
        every = own.new_zeros(world.size, *own.shape)
        every[world.rank] = own
        sizes, means, variances = sum_over_workers(every, world=world).unbind(1)
        size = sizes.sum(0)
        if size[0] <= 1:
            raise ValueError("Expected more than 1 value per channel when training, over all workers together")
        mean = (sizes * means).sum(0) / size
        squares = (sizes * (variances + (means - mean).square())).sum(0)
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((squares / (size - 1)).to(running_var.dtype), momentum)
        scale = (squares / size + eps).rsqrt().float()
        mean = mean.float()
        ctx.save_for_backward(inputs, weight, mean, scale, size.float())
        ctx.world, ctx.counts, ctx.has_bias = world, counts, bias is not None
        normed = (inputs.float() - mean.view(shape)) * scale.view(shape)
        if weight is not None:
            normed = normed * weight.float().view(shape)
        if bias is not None:
            normed = normed + bias.float().view(shape)
        return normed.to(inputs.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, mean, scale, size = ctx.saved_tensors
        dims, shape = _layout(inputs)
        normed, slope = (inputs.float() - mean.view(shape)) * scale.view(shape), gradient.float()
        own = torch.stack([slope.sum(dims), (slope * normed).sum(dims)])
        of_bias, of_weight = own
        mean_slope, mean_product = sum_over_workers(own, world=ctx.world) / size
        if ctx.counts:
            slope = slope - mean_slope.view(shape) - normed * mean_product.view(shape)
        factor = scale if weight is None else scale * weight.float()
        return (
            (slope * factor.view(shape)).to(inputs.dtype),
            None if weight is None else of_weight.to(weight.dtype),
            of_bias.to(gradient.dtype if weight is None else weight.dtype) if ctx.has_bias else None,
            *(None,) * 6,
        )


def _layout(inputs: Tensor) -> tuple[list[int], Sizes]:
    """The dimensions over which statistics are taken, and the shape of a value per channel."""
    dims = [dim for dim in range(inputs.ndim) if dim != 1]
    return dims, tuple(size if dim == 1 else 1 for dim, size in enumerate(inputs.shape))
