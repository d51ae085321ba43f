"""Low rank: a layer becomes two thin ones, the best product of that rank in place of its weights.

The weights of a linear layer are a matrix, and those of a convolution too: (out channels) x (in channels x kernel). Its
singular value decomposition, cut off at rank r, is a layer of r outputs, with the same kernel, stride and padding, then
one that mixes those r: linear, or a 1x1 convolution (Zhang et al. 2015, https://arxiv.org/abs/1505.06798).
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from heliostat.compression.layers import WEIGHTED, skipped
from heliostat.errors import SpecError, StageError


def factorize(
    model: nn.Module, *, rank: int | None = None, energy: float | None = None, skip: Sequence[str] = ()
) -> tuple[nn.Module, list[dict[str, Any]], dict[str, str]]:
    """A copy of `model` with thin layers, the history that rebuilds its shapes, and why other layers stay as they are.

    Args:
        rank: of every layer. Or
        energy: the fraction of each layer's sum of squared singular values to keep, in (0, 1]; its rank follows.
        skip: patterns (as of `fnmatch`) of names of layers to leave alone.

    Raises:
        SpecError: a pattern that matches no layer; neither rank nor energy, or both; a value out of its range.
        StageError: no layer gets smaller.
    """
    if (rank is None) == (energy is None):
        raise SpecError("give a rank or an energy")
    if (rank is not None and rank < 1) or (energy is not None and not 0 < energy <= 1):
        raise SpecError(f"rank {rank} is not 1 or more" if rank is not None else f"energy {energy} is not in (0, 1]")
    model = copy.deepcopy(model)
    kept = skipped(model, skip)
    ranks, factors = {}, {}
    for name, layer in model.named_modules():
        if name in kept:
            continue
        reason = _why_not(layer)
        if reason:
            kept |= dict.fromkeys((inner for inner, _ in layer.named_modules(prefix=name)), reason)
        elif isinstance(layer, WEIGHTED):
            matrix = layer.weight.detach().flatten(1)
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
            r = min(rank if rank is not None else _rank_of(s, energy or 1.0), len(s))
            if r * sum(matrix.shape) >= matrix.numel():
                kept[name] = f"at rank {r} its {matrix.shape[0]}x{matrix.shape[1]} weights would not get fewer"
            else:
                root = s[:r].sqrt()
                ranks[name], factors[name] = r, (root[:, None] * vh[:r], u[:, :r] * root)
    if not ranks:
        raise StageError("no layer gets smaller: " + "; ".join(f"{name}: {reason}" for name, reason in kept.items()))
    biases: dict[str, Any] = {name: model.get_submodule(name).bias for name in ranks}
    step = {"op": "factorize", "ranks": ranks}
    replay(model, step)
    with torch.no_grad():
        for name, (first, second) in factors.items():
            thin, mix = (model.get_submodule(f"{name}.{part}") for part in (0, 1))
            _fill(thin, first, None)
            _fill(mix, second, biases[name])
    return model, [step], kept


def replay(model: nn.Module, step: Mapping[str, Any]) -> None:
    """Put two layers of the step's ranks in place of each layer that it names. Their weights are to be loaded."""
    for name, rank in step["ranks"].items():
        layer = model.get_submodule(name)
        model.set_submodule(name, _two_layers(layer, rank).train(layer.training))


def _two_layers(layer: nn.Module, rank: int) -> nn.Sequential:
    if isinstance(layer, nn.Linear):
        thin: nn.Module = nn.Linear(layer.in_features, rank, bias=False)
        return nn.Sequential(thin, nn.Linear(rank, layer.out_features, bias=layer.bias is not None))
    assert isinstance(layer, nn.modules.conv._ConvNd)
    kind: Any = type(layer)
    thin = kind(
        layer.in_channels,
        rank,
        layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        padding_mode=layer.padding_mode,
        bias=False,
    )
    return nn.Sequential(thin, kind(rank, layer.out_channels, 1, bias=layer.bias is not None))


def _why_not(layer: nn.Module) -> str | None:
    """Why a layer, and all inside it, cannot be made of two."""
    if isinstance(layer, (nn.RNNBase, nn.MultiheadAttention)):
        return f"{type(layer).__name__}: it reads its weights by itself"
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return f"{type(layer).__name__}: only plain convolutions are made of two"
    if isinstance(layer, nn.modules.conv._ConvNd) and layer.groups > 1:
        return "its groups of channels are thin already"
    return None


def _rank_of(singular_values: Tensor, energy: float) -> int:
    """The fewest values that hold this fraction of the sum of squares."""
    shares = singular_values.square().cumsum(0) / singular_values.square().sum()
    return min(int((shares < energy).sum()) + 1, len(singular_values))


def _fill(layer: nn.Module, matrix: Tensor, bias: Tensor | None) -> None:
    layer.get_parameter("weight").copy_(matrix.view(layer.get_parameter("weight").shape))
    if bias is not None:
        layer.get_parameter("bias").copy_(bias)
