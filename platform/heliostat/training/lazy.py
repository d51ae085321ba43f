"""Lazy layers, such as `nn.LazyLinear`, which learn their sizes from the first inputs.

They get them before anything looks at the parameters: the optimizer, averages, strategies and the memory layout.
"""

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from heliostat.errors import StageError


def lazy_layers(model: nn.Module) -> list[str]:
    """Return the names of the layers whose sizes are not known yet."""
    return [name for name, module in model.named_modules() if isinstance(module, LazyModuleMixin)]


def materialize(model: nn.Module, inputs: Callable[[], Tensor]) -> None:
    """Give lazy layers their sizes by forward passes over a few real inputs; a model without any is left alone.

    Layers of a branch that only training has get theirs in a pass in training mode, after which buffers are put back.
    Raises StageError for a model that fails on the inputs, and for layers that it does not call.
    """
    if not lazy_layers(model):
        return
    rows, was_training = inputs(), model.training
    try:
        with torch.no_grad():
            model.eval()(rows)
            if lazy_layers(model):
                known = {name: buffer.clone() for name, buffer in model.named_buffers() if not is_lazy(buffer)}
                model.train()(rows)
                for name, buffer in model.named_buffers():
                    if name in known:
                        buffer.copy_(known[name])
    except Exception as error:  # the user's forward may raise anything
        names = ", ".join(lazy_layers(model)) or "its lazy layers"
        raise StageError(
            f"task.model: {names} cannot get their sizes, since the model fails on {len(rows)} samples: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        model.train(was_training)
    if left := [name for name in lazy_layers(model) if any(map(is_lazy, _tensors(model.get_submodule(name))))]:
        raise StageError(f"task.model: the lazy layers {', '.join(left)} are not called by its forward; remove them")


def _tensors(module: nn.Module) -> chain[Tensor]:
    return chain(module.parameters(), module.buffers())
