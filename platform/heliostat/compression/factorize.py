"""Low rank: a layer becomes two thin ones, the best product of that rank in place of its weights.

The weights of a linear layer are a matrix, and those of a convolution too: (out channels) x (in channels x kernel). Its
singular value decomposition, cut off at rank r, is a layer of r outputs, with the same kernel, stride and padding, then
one that mixes those r: linear, or a 1x1 convolution (Zhang et al. 2015, https://arxiv.org/abs/1505.06798).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from heliostat.compression.layers import WEIGHTED, skipped, tied_parameters
from heliostat.compression.parametrizations import copied
from heliostat.compression.proof import CHECKED_ROWS, find_sound, why_apart
from heliostat.errors import SpecError, StageError

HAVING = "with two thin layers in its place"


def factorize(
    model: nn.Module,
    *,
    rank: int | None = None,
    energy: float | None = None,
    skip: Sequence[str] = (),
    example: Tensor | None = None,
) -> tuple[nn.Module, list[dict[str, Any]], dict[str, str]]:
    """A copy of `model` with thin layers, the history that rebuilds its shapes, and why other layers stay as they are.

    Args:
        rank: of every layer. Or
        energy: the fraction of each layer's sum of squared singular values to keep, in (0, 1]; its rank follows.
        skip: patterns (as of `fnmatch`) of names of layers to leave alone.
        example: a batch of real data. A layer is left alone where two thin ones do not compute what their product does
            as its weight, such as one whose weight another module reads.

    Raises:
        SpecError: a pattern that matches no layer; neither rank nor energy, or both; a value out of its range.
        StageError: no layer gets smaller.
    """
    if (rank is None) == (energy is None):
        raise SpecError("give a rank or an energy")
    if (rank is not None and rank < 1) or (energy is not None and not 0 < energy <= 1):
        raise SpecError(f"rank {rank} is not 1 or more" if rank is not None else f"energy {energy} is not in (0, 1]")
    model = copied(model)
    kept = {**_several_names(model), **skipped(model, skip)}
    ranks: dict[str, int] = {}
    factors: dict[str, tuple[Tensor, Tensor]] = {}
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
    smaller, step = _factorized(model, ranks, factors)
    if example is not None:
        rows = example[:CHECKED_ROWS]

        def try_(names: list[str]) -> str | None:
            some = {name: ranks[name] for name in names}
            changed, _ = _factorized(model, some, factors)
            like = "the layers of that rank"
            return why_apart(changed, _with_products(model, some, factors), rows, having=HAVING, like=like)

        sound, reasons = find_sound(list(ranks), try_)
        kept |= reasons
        smaller, step = _factorized(model, {name: ranks[name] for name in sound}, factors)
    if not step["ranks"]:
        raise StageError("no layer gets smaller: " + "; ".join(f"{name}: {reason}" for name, reason in kept.items()))
    return smaller, [step], kept


def _factorized(
    model: nn.Module, ranks: Mapping[str, int], factors: Mapping[str, tuple[Tensor, Tensor]]
) -> tuple[nn.Module, dict[str, Any]]:
    """A copy with two thin layers in place of each, and the step that rebuilds its shapes."""
    smaller = copied(model)
    step = {"op": "factorize", "ranks": dict(ranks)}
    replay(smaller, step)
    with torch.no_grad():
        for name in ranks:
            thin, mix = (smaller.get_submodule(f"{name}.{part}") for part in (0, 1))
            _fill(thin, factors[name][0], None)
            _fill(mix, factors[name][1], model.get_submodule(name).bias)  # type: ignore[arg-type]
    return smaller, step


def _with_products(model: nn.Module, names: Iterable[str], factors: Mapping[str, tuple[Tensor, Tensor]]) -> nn.Module:
    """A copy with the product of its two factors for the weight of each layer."""
    same = copied(model)
    with torch.no_grad():
        for name in names:
            weight = same.get_submodule(name).get_parameter("weight")
            first, second = factors[name]
            weight.copy_((second @ first).view(weight.shape))
    return same


def replay(model: nn.Module, step: Mapping[str, Any]) -> None:
    """Put two layers of the step's ranks in place of each layer that it names. Their weights are to be loaded."""
    for name, rank in step["ranks"].items():
        layer = model.get_submodule(name)
        model.set_submodule(name, _two_layers(layer, rank).train(layer.training))
    _without_fused_kernels(model)


def _without_fused_kernels(model: nn.Module) -> None:
    """Keep encoder layers with thin layers off their fused kernel, which reads the weights of full ones."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _has_thin_layers(module):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder) and any(_has_thin_layers(layer) for layer in module.layers):
            module.use_nested_tensor = False


def _has_thin_layers(layer: nn.Module) -> bool:
    return isinstance(layer, nn.TransformerEncoderLayer) and any(
        isinstance(part, nn.Sequential) for part in (layer.linear1, layer.linear2)
    )


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


def _several_names(model: nn.Module) -> dict[str, str]:
    """The layers that are one with another, or whose weight is, each with the reason why it is left alone."""
    by_layer: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        by_layer.setdefault(id(module), []).append(name)
    found = {
        name: f"it is the same layer as {next(other for other in names if other != name)!r}"
        for names in by_layer.values()
        if len(names) > 1
        for name in names
    }
    for names in tied_parameters(model):
        for name in names:
            layer, other = name.rpartition(".")[0], next(other for other in names if other != name)
            found.setdefault(layer, f"its {name.rpartition('.')[2]} is also {other!r}")
    return found


def _why_not(layer: nn.Module) -> str | None:
    """Why a layer, and all inside it, cannot be made of two."""
    if isinstance(layer, (nn.RNNBase, nn.MultiheadAttention)):
        return f"{type(layer).__name__}: it reads its weights by itself"
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return f"{type(layer).__name__}: only plain convolutions are made of two"
    if isinstance(layer, nn.modules.conv._ConvNd) and layer.groups > 1:
        return "its groups of channels are thin already"
    if isinstance(layer, WEIGHTED) and (layer._forward_hooks or layer._forward_pre_hooks):
        return "it has hooks of its own, which two layers in its place would not have"
    return None


def _rank_of(singular_values: Tensor, energy: float) -> int:
    """The fewest values that hold this fraction of the sum of squares."""
    shares = singular_values.square().cumsum(0) / singular_values.square().sum()
    return min(int((shares < energy).sum()) + 1, len(singular_values))


def _fill(layer: nn.Module, matrix: Tensor, bias: Tensor | None) -> None:
    layer.get_parameter("weight").copy_(matrix.view(layer.get_parameter("weight").shape))
    if bias is not None:
        layer.get_parameter("bias").copy_(bias)
