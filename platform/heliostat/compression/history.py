"""What compression did to a model's shapes, as plain numbers, so that the same can be done to a freshly built model.

A compressed torch model is saved as its constructor, its history and its weights, never as a pickled object. A history
is a list of steps, each a mapping with an `op` that `REPLAY` has a function for.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from heliostat.compression import factorize, parametrizations
from heliostat.compression.prune import heads, steps
from heliostat.compression.quantize import eager

History = list[dict[str, Any]]

REPLAY: dict[str, Callable[[nn.Module, Mapping[str, Any]], None]] = {
    "bake": parametrizations.replay,
    "structured": steps.replay,
    "heads": heads.replay,
    "factorize": factorize.replay,
    "int8_linear": eager.replay,
}
"""What each kind of step does to a freshly built model, in place."""


def replay(model: nn.Module, history: Sequence[Mapping[str, Any]]) -> nn.Module:
    """Give a freshly built model the shapes that `history` led to, in place. The weights are to be loaded after it."""
    for step in history:
        REPLAY[step["op"]](model, step)
    return model
