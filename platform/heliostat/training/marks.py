"""A few numbers for each layer, by which the layers of a model that was validated and of the saved one are compared.

Of what a layer gives for the first sample of validation only the mean and the root mean square are kept: enough to find
the first layer that computes something else, for a few bytes and hardly any computation.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Marks = dict[str, list[float]]
"""By layer, in the order in which their first calls end: mean and root mean square, and the rows of the batch. The
last is the model itself, which has no name."""

TOLERANCE = 1e-3


def hookable_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the named modules that take forward hooks: all but those that TorchScript compiled."""
    return [(name, module) for name, module in model.named_modules() if not isinstance(module, torch.jit.ScriptModule)]


@contextmanager
def marking(model: nn.Module) -> Iterator[Marks]:
    """Within it the first call of the model fills the marks.

    A model that torch compiles has none: to look into it would compile it anew.
    """
    marks: Marks = {}
    handles: list[RemovableHandle] = []

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(module: nn.Module, given: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if name not in marks and isinstance(first, Tensor) and first.numel() and first.layout == torch.strided:
                rows = len(first) if first.ndim else 1
                values = first[:1] if first.ndim else first  # of all rows it would take longer than the layer itself
                values = torch.view_as_real(values) if values.is_complex() else values
                values = values.detach().double()
                marks[name] = [values.mean().item(), values.square().mean().sqrt().item(), rows]
            if not name:
                remove()

        return note

    def remove() -> None:
        while handles:
            handles.pop().remove()

    if not any("_orig_mod" in module._modules or module._compiled_call_impl is not None for module in model.modules()):
        handles += [module.register_forward_hook(hook(name)) for name, module in hookable_modules(model)]
    try:
        yield marks
    finally:
        remove()


def first_apart(
    found: Mapping[str, Sequence[float]], wanted: Mapping[str, Sequence[float]]
) -> tuple[str | None, str | None]:
    """The first layer whose marks are not those wanted, and the one before it, which agrees; or None."""
    agrees = None
    for layer, (mean, size, _) in wanted.items():
        if layer not in found:
            continue
        allowed = TOLERANCE * max(abs(size), 1e-6)
        if not (abs(found[layer][0] - mean) <= allowed and abs(found[layer][1] - size) <= allowed):
            return layer, agrees
        agrees = layer
    return None, agrees
