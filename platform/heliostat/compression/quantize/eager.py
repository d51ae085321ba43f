"""8-bit weights in a torch model, by torchao: it stays a torch model, and needs torchao where it is loaded.

`weight_only` computes in float, `dynamic` in int8 with the ranges of the activations found at every call. Both are for
linear layers. What was done is a step of plain numbers, as pruning's are, so the artifact holds no pickled object.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from heliostat.compression.layers import skipped
from heliostat.compression.parametrizations import bake, copied
from heliostat.compression.quiet import quiet
from heliostat.errors import StageError

Scheme = Literal["dynamic", "weight_only"]


def quantize_linear(
    model: nn.Module, *, scheme: Scheme, skip: Sequence[str] = ()
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A copy of `model` whose linear layers have int8 weights, a scale for each row, and the history that redoes it.

    Raises:
        SpecError: a pattern of `skip` (as of `fnmatch`) that matches no layer.
        StageError: there is no linear layer that is not skipped.
    """
    kept = skipped(model, skip)
    model = copied(model)
    baked = bake(model)
    layers = [name for name, layer in model.named_modules() if type(layer) is nn.Linear and name not in kept]
    if not layers:
        raise StageError("there is nothing to quantize: no linear layer that is not skipped")
    step = {"op": "int8_linear", "scheme": scheme, "layers": layers}
    replay(model, step)
    return model, [*baked, step]


def replay(model: nn.Module, step: Mapping[str, Any]) -> None:
    """Give the step's layers weights of its kind, in place."""
    with quiet():  # torchao tells on import which of its GPU libraries do not load
        from torchao.quantization import (
            Int8DynamicActivationInt8WeightConfig,
            Int8WeightOnlyConfig,
            quantize_,
        )

        schemes: dict[str, Callable[[], Any]] = {
            "dynamic": Int8DynamicActivationInt8WeightConfig,
            "weight_only": Int8WeightOnlyConfig,
        }
        layers = set(step["layers"])
        quantize_(model, schemes[step["scheme"]](), filter_fn=lambda layer, name: name in layers)
