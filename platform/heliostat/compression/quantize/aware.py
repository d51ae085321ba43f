"""Quantization-aware training: a network learns under the rounding that int8 will bring (Jacob et al. 2017,
https://arxiv.org/abs/1712.05877).

`attach` makes every convolution and linear layer see its weights and its inputs rounded to the grid that static
quantization uses, while gradients pass as if they were not (the straight-through estimator). `detach` takes that off,
and nothing else: the weights are float again, and static quantization loses little of them. A layer that computes its
weight (weight norm, spectral norm) keeps computing it, and the result is rounded. With one scale for each output
channel the grid does not change when batch norm is folded into the weights, so both see the same one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from heliostat.compression.layers import WEIGHTED, skipped
from heliostat.compression.parametrizations import copied
from heliostat.errors import StageError

MOMENTUM = 0.05
"""How much a batch moves the range of an activation."""
TINY = 1e-8


class _RoundedWeight(nn.Module):
    """Symmetric, 2 * limit + 1 steps; a scale for each slice along `axis`, or one for all if that is None."""

    def __init__(self, *, limit: int, axis: int | None) -> None:
        super().__init__()
        self.limit, self.axis, self.enabled = limit, axis, True

    def forward(self, weight: Tensor) -> Tensor:
        if not self.enabled:
            return weight
        largest = weight.detach().abs()
        if self.axis is None:
            scale, zero = largest.max().clamp(min=TINY) / self.limit, torch.zeros((), dtype=torch.int32)
            return torch.fake_quantize_per_tensor_affine(weight, scale, zero, -self.limit, self.limit)
        scales = largest.transpose(0, self.axis).flatten(1).amax(1).clamp(min=TINY) / self.limit
        zeros = torch.zeros_like(scales, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scales, zeros, self.axis, -self.limit, self.limit)


class _RoundedInput(nn.Module):
    """Asymmetric, 256 steps over a moving average of the range seen in training, which always has 0 in it."""

    low: Tensor
    high: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.enabled:
            return inputs
        if self.training:
            seen_low, seen_high = inputs.detach().aminmax()
            first = (self.high - self.low) == 0
            for bound, seen in ((self.low, seen_low.clamp(max=0)), (self.high, seen_high.clamp(min=0))):
                bound.copy_(torch.where(first, seen, bound + MOMENTUM * (seen - bound)))
        scale = ((self.high - self.low) / 255).clamp(min=TINY)
        zero = (-self.low / scale).round().clamp(0, 255).to(torch.int32)
        return torch.fake_quantize_per_tensor_affine(inputs, scale, zero, 0, 255)


def attach(model: nn.Module, *, per_channel: bool, reduce_range: bool, skip: Sequence[str] = ()) -> dict[str, str]:
    """Round weights and inputs from now on, in place. Returns the layers that stay exact, with the reason.

    Args:
        per_channel: one scale for each output channel of a weight, instead of one for each weight.
        reduce_range: 7-bit weights, as `post_training.static` makes them.
        skip: patterns (as of `fnmatch`) of names of layers that stay exact.

    Raises:
        SpecError: a pattern that matches no layer.
        StageError: there is no layer to round.
    """
    exact = skipped(model, skip)
    for name, module in model.named_modules():
        if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
            inside = {inner for inner, _ in module.named_modules(prefix=name)}
            exact |= dict.fromkeys(inside - exact.keys(), f"{type(module).__name__}: it reads its weights by itself")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, WEIGHTED) and n not in exact}
    if not layers:
        raise StageError("there is nothing to quantize: no convolution or linear layer that is not skipped")
    for layer in layers.values():
        axis = 1 if getattr(layer, "transposed", False) else 0
        rounded = _RoundedWeight(limit=64 if reduce_range else 127, axis=axis if per_channel else None)
        if "weight" in layer._parameters or parametrize.is_parametrized(layer, "weight"):
            parametrize.register_parametrization(layer, "weight", rounded)
        else:  # a hook computes it, before this one
            layer.register_forward_pre_hook(_RoundComputedWeight(rounded))
        layer.add_module("rounded_input", _RoundedInput())
        layer.register_forward_pre_hook(_round_input, with_kwargs=True)
    return exact


def detach(model: nn.Module) -> None:
    """Undo `attach`, in place: exact computation with the weights as they were trained."""
    for layer in list(model.modules()):
        if not isinstance(getattr(layer, "rounded_input", None), _RoundedInput):
            continue
        if parametrize.is_parametrized(layer, "weight"):
            _take_off(layer)
        del layer.rounded_input
        for key, hook in list(layer._forward_pre_hooks.items()):
            if hook is _round_input or isinstance(hook, _RoundComputedWeight):
                del layer._forward_pre_hooks[key]
                layer._forward_pre_hooks_with_kwargs.pop(key, None)


def without_rounding(model: nn.Module) -> nn.Module:
    """A copy of a model with `attach`ed rounding that computes exactly."""
    model = copied(model)
    for module in model.modules():
        if isinstance(module, (_RoundedWeight, _RoundedInput)):
            module.enabled = False
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, _RoundComputedWeight):
                hook.rounded.enabled = False
    return model


def _take_off(layer: nn.Module) -> None:
    """Take the rounding off the chain that computes the weight, and the chain away where nothing else is in it."""
    chain: Any = layer.parametrizations["weight"]  # type: ignore[index]
    (index,) = (number for number, part in enumerate(chain) if isinstance(part, _RoundedWeight))
    if len(chain) > 1:
        del chain[index]
    else:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


class _RoundComputedWeight:
    """A hook before the forward of a layer whose weight another hook has just computed."""

    def __init__(self, rounded: _RoundedWeight) -> None:
        self.rounded = rounded

    def __call__(self, layer: Any, arguments: Any) -> None:
        layer.weight = self.rounded(layer.weight)


def _round_input(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
    rounded = layer.get_submodule("rounded_input")
    if arguments:
        return (rounded(arguments[0]), *arguments[1:]), named
    return arguments, {name: rounded(value) if name == "input" else value for name, value in named.items()}
