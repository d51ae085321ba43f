"""Which layers compression works on, and how a user names some of them: `fnmatch` patterns of their names."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from heliostat.errors import SpecError, nearest

WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)
"""Layers that are a matrix product at heart."""


def names_matching(layers: Sequence[str], pattern: str, *, option: str) -> list[str]:
    """Those that match. Raises SpecError with the nearest name if there are none; `option` is what the user set."""
    found = [name for name in layers if fnmatchcase(name, pattern)]
    if not found:
        raise SpecError(f"{option}: {pattern!r} matches no layer{nearest(pattern, layers)}")
    return found


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
