"""What is done with gradients that are spread over workers: averaged, measured and clipped."""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from heliostat.training.world import World, sum_over_workers


def is_spread(tensor: Tensor) -> bool:
    """Whether it is a DTensor. Importing that class to ask would cost every process 0.4 s."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """This worker's part of a tensor that is spread over workers; any other tensor itself."""
    return tensor.to_local() if is_spread(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that is spread over workers, who must all call it; any other tensor itself."""
    return tensor.full_tensor() if is_spread(tensor) else tensor  # type: ignore[attr-defined]


def average_gradients(parameters: Iterable[nn.Parameter], *, data: World) -> None:
    """Replace every gradient by its mean over the workers that share the global batch, in one message."""
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    if data.size == 1 or not gradients:
        return
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat, group=data.group)
    flat /= data.size
    for gradient, part in zip(gradients, torch.split(flat, [gradient.numel() for gradient in gradients])):
        gradient.copy_(part.view_as(gradient))


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, *, stages: World) -> None:
    """Scale all gradients so that their common norm is `max_norm` at most. `stages` hold further parts of the model."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    kinds = [[g for g in gradients if not is_spread(g)], [g for g in gradients if is_spread(g)]]
    norms = [whole(nn.utils.get_total_norm(kind)).double() for kind in kinds if kind]
    squares = sum((norm**2 for norm in norms), torch.zeros((), dtype=torch.float64, device=stages.device))
    norm_of_all = math.sqrt(sum_over_workers(squares, world=stages).item())
    factor = max_norm / (norm_of_all + 1e-6)
    if factor < 1:
        torch._foreach_mul_([local(gradient) for gradient in gradients], factor)
