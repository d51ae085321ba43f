"""Quantization-aware training: a network learns under the rounding that int8 will bring (Jacob et al. 2017,
https://arxiv.org/abs/1712.05877).

`attach` makes every convolution and linear layer see its weights and its inputs rounded to the grid that static
quantization uses, while gradients pass as if they were not (the straight-through estimator). `detach` takes that off:
the weights are float again, and static quantization loses little of them. With one scale for each output channel the
grid does not change when batch norm is folded into the weights, so both see the same one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from heliostat.compression.layers import WEIGHTED, skipped
from heliostat.errors import StageError

MOMENTUM = 0.05
"""How much a batch moves the range of an activation."""
TINY = 1e-8


class _RoundedWeight(nn.Module):
    """Symmetric, 2 * limit + 1 steps; a scale for each slice along `axis`, or one for all if that is None."""

    def __init__(self, *, limit: int, axis: int | None) -> None:
        super().__init__()
        self.limit, self.axis = limit, axis

    def forward(self, weight: Tensor) -> Tensor:
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
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
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
        parametrize.register_parametrization(layer, "weight", rounded)
        layer.add_module("rounded_input", _RoundedInput())
        layer.register_forward_pre_hook(_round_input)
    return exact


def detach(model: nn.Module) -> None:
    """Undo `attach`, in place: exact computation with the weights as they were trained."""
    for layer in list(model.modules()):
        if isinstance(getattr(layer, "rounded_input", None), _RoundedInput):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
            del layer.rounded_input
            layer._forward_pre_hooks.clear()


def _round_input(layer: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (layer.get_submodule("rounded_input")(arguments[0]), *arguments[1:])
