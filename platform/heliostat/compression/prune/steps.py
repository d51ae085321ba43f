"""One cut as a step of plain numbers, which gives a freshly built model the same shapes.

`{"op": "structured", "input": ..., "groups": [[layer, True, channels], ...], "tied": [[parameter, parameter], ...]}`:
the channels to remove, in this order, and the parameters that are one in several layers and stay so. `training` says
that the model was traced in training mode, where more layers take part.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from heliostat.compression.layers import tie, tied_parameters
from heliostat.compression.parametrizations import copied
from heliostat.compression.prune.dependency import Graph
from heliostat.compression.prune.graph import dependencies, ready_to_trace
from heliostat.compression.quiet import quiet
from heliostat.errors import StageError

Positions = Mapping[str, Tensor]
"""By parameter name, in the shape after the cut: the position of each element in the flattened original."""


def step_of(
    model: nn.Module, example: Tensor, groups: Sequence[tuple[str, Sequence[int]]], *, training: bool = False
) -> dict[str, Any]:
    """Return the step that removes these channels of these layers, of a model traced in this mode."""
    tied = tied_parameters(model)
    return {
        "op": "structured",
        "input": {"shape": list(example.shape[1:]), "dtype": str(example.dtype).removeprefix("torch.")},
        "groups": [[name, True, list(channels)] for name, channels in groups],
        **({"tied": tied} if tied else {}),
        **({"training": True} if training else {}),
    }


def replay(model: nn.Module, step: Mapping[str, Any]) -> None:
    """Give a freshly built model the shapes of a step's, in place."""
    with ready_to_trace(model), quiet():
        _graph(model, step).redo(step["groups"])
    tie(model, step.get("tied", ()))


def cut(model: nn.Module, step: Mapping[str, Any]) -> tuple[nn.Module, Positions]:
    """Return a copy of `model` after the step, and where its parameters come from.

    Raises StageError where the layers that share a weight would be left with different parts of it.
    """
    smaller = copied(model)
    with ready_to_trace(smaller), quiet():
        graph = _graph(smaller, step)
        values = {name: tensor.detach().clone() for name, tensor in _tensors(smaller).items()}
        for tensor in _tensors(smaller).values():  # each element becomes its own position, and is cut as such
            tensor.data = torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape)
        graph.redo(step["groups"])
        positions = {name: tensor.detach().long() for name, tensor in _tensors(smaller).items()}
        for name, tensor in _tensors(smaller).items():
            tensor.data = values[name].flatten()[positions[name]]
    for first, *others in step.get("tied", ()):
        for name in others:
            if not torch.equal(positions[name], positions[first]):
                raise StageError(f"{name!r} is tied to {first!r}, of which other channels would stay")
    tie(smaller, step.get("tied", ()))
    parameters = {name for name, _ in smaller.named_parameters(remove_duplicate=False)}
    return smaller, {name: where for name, where in positions.items() if name in parameters}


def _graph(model: nn.Module, step: Mapping[str, Any]) -> Graph:
    example = torch.zeros(1, *step["input"]["shape"], dtype=getattr(torch, step["input"]["dtype"]))
    return dependencies(model, example, training=step.get("training", False))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that a cut may make smaller, under every name that they have."""
    buffers = model.named_buffers(remove_duplicate=False)
    floating = {name: buffer for name, buffer in buffers if buffer.is_floating_point()}
    return {**dict(model.named_parameters(remove_duplicate=False)), **floating}
