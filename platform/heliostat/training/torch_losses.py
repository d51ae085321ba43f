"""Losses of torch that divide by a weight of their own, as `(sum, weight)`.

The mean of `cross_entropy` and `nll_loss` is over the targets that are not ignored, each with the weight of its class.
So the mean over a global batch is no mean of the means over its parts; their sums and weights add up.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

FUNCTIONS: tuple[Callable[..., Tensor], ...] = (functional.cross_entropy, functional.nll_loss)
MODULES: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.CrossEntropyLoss: functional.cross_entropy,
    nn.NLLLoss: functional.nll_loss,
}
OPTIONS = frozenset({"weight", "ignore_index", "label_smoothing"})


def as_sum(loss: Callable[..., Any]) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """Return the loss as `(outputs, targets) -> (sum, weight)`; None for what is none of these, or no mean."""
    function, options = _function_of(loss)
    if function not in FUNCTIONS or options.pop("reduction", "mean") != "mean" or set(options) - OPTIONS:
        return None

    def summed(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        total = function(outputs, targets, reduction="sum", **options)
        return total, weight_of(outputs, targets, options.get("weight"), options.get("ignore_index", -100))

    return summed


def is_of_torch(loss: Callable[..., Any]) -> bool:
    """Whether the loss is one of torch's own, or of a class that is derived from one."""
    while isinstance(loss, partial):
        loss = loss.func
    if isinstance(loss, nn.Module):
        return any(kind.__module__ == "torch.nn.modules.loss" for kind in type(loss).__mro__)
    return str(getattr(loss, "__module__", "")).startswith("torch.")


def _function_of(loss: Callable[..., Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function behind a loss, and its options."""
    if isinstance(loss, partial) and not loss.args:
        return loss.func, dict(loss.keywords)
    if isinstance(loss, nn.Module):
        function = MODULES.get(type(loss))
        options: Mapping[str, Any] = {name: getattr(loss, name) for name in OPTIONS if hasattr(loss, name)}
        return function or loss, {**options, "reduction": getattr(loss, "reduction", "mean")}
    return loss, {}


def weight_of(outputs: Tensor, targets: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """Return what the sum over these targets is divided by to be the mean. Probabilities count one each."""
    if targets.is_floating_point():
        classes = outputs.shape[1] if outputs.ndim > 1 else outputs.shape[0]
        return torch.tensor(outputs.numel() / classes, device=outputs.device)
    counted = targets != ignore_index
    if weight is None:
        return counted.sum()
    return (weight[targets.where(counted, 0)] * counted).sum()
