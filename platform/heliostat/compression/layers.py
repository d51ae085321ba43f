"""Which layers compression works on, and how a user names some of them: `fnmatch` patterns of their names."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from heliostat.errors import SpecError, nearest

WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)
"""Layers that are a matrix product at heart."""
SHAPE_KEPT = (nn.Identity, nn.Dropout, nn.Softmax, nn.LogSoftmax, nn.Sigmoid, nn.LogSigmoid)
"""Layers that give as many outputs as they take, and end some models."""


def names_matching(layers: Sequence[str], pattern: str, *, option: str) -> list[str]:
    """Those that match. Raises SpecError with the nearest name if there are none; `option` is what the user set."""
    found = [name for name in layers if fnmatchcase(name, pattern)]
    if not found:
        raise SpecError(f"{option}: {pattern!r} matches no layer{nearest(pattern, layers)}")
    return found


def num_outputs(model: nn.Module) -> int | None:
    """How many outputs, classes or channels, a model gives that ends in a layer; None where that cannot be told.

    The model's graph is traced: nothing is computed, so it may be on torch's meta device.
    """
    from torch import fx

    try:
        graph = fx.symbolic_trace(model)
    except Exception:  # a forward pass that looks at values, or does what cannot be traced
        return None
    (end,) = (node for node in graph.graph.nodes if node.op == "output")
    node = end.args[0]
    while isinstance(node, fx.Node) and node.op == "call_module":
        layer = graph.get_submodule(str(node.target))
        if isinstance(layer, nn.Linear):
            return layer.out_features
        if isinstance(layer, nn.modules.conv._ConvNd):
            return layer.out_channels
        if not isinstance(layer, SHAPE_KEPT):
            return None
        node = node.args[0]
    return None


def skipped(model: nn.Module, patterns: Sequence[str]) -> dict[str, str]:
    """The layers whose names match, and all that is inside them, each with the pattern as the reason.

    Raises SpecError for a pattern that matches no layer.
    """
    layers = [name for name, _ in model.named_modules() if name]
    tops = {name: pattern for pattern in patterns for name in names_matching(layers, pattern, option="skip")}
    return {
        name: f"matches the pattern {pattern!r}"
        for top, pattern in tops.items()
        for name, _ in model.get_submodule(top).named_modules(prefix=top)
    }


def tied_parameters(model: nn.Module) -> list[list[str]]:
    """Return the names of each parameter that more than one layer has."""
    owners: dict[int, dict[tuple[int, str], str]] = {}
    for layer, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), {})[id(module), name] = f"{layer}.{name}" if layer else name
    return [list(names.values()) for names in owners.values() if len(names) > 1]


def tie(model: nn.Module, names: Iterable[Sequence[str]]) -> None:
    """Make the parameters of each list one, the first, in place."""
    for first, *others in names:
        parameter = model.get_parameter(first)
        for name in others:
            layer, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(layer), attribute, parameter)
