"""What depends on what in a network: torch-pruning's dependency graph (DepGraph, Fang et al. 2023,
https://arxiv.org/abs/2301.12900), read off one forward.

A group is all that has to go when a channel of one layer goes. Recurrent layers and attention are made one operation of
fixed width, since their own `forward` relies on it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn

from heliostat.compression.layers import WEIGHTED
from heliostat.compression.quiet import quiet

PRUNABLE = (*WEIGHTED, nn.Embedding)
"""Layers whose width can change."""
FIXED_WIDTH = (nn.RNNBase, nn.MultiheadAttention)
"""Layers that keep their width, as do the neighbours on whose width theirs depends."""


@contextmanager
def ready_to_trace(model: nn.Module) -> Iterator[None]:
    """The dependency graph is read off autograd: every parameter takes part, and nothing is updated by the forward."""
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    training = model.training
    model.eval().requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        model.train(training)
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)


def dependencies(model: nn.Module, example: Tensor) -> Any:
    """The graph of a model that is ready to trace."""
    with quiet():
        return torch_pruning.DependencyGraph().build_dependency(
            model, example_inputs=example, forward_fn=_forward, customized_pruners=_recurrent_layers()
        )


def groups_by_layer(graph: Any, kept: Mapping[str, str]) -> dict[str, Any]:
    """The groups none of whose layers is kept, each by the name of the layer that its channels are numbered by."""
    names = {module: name for name, module in graph.model.named_modules()}
    ignored = [graph.model.get_submodule(name) for name in kept]
    groups = graph.get_all_groups(ignored_layers=ignored, root_module_types=PRUNABLE)
    return {names[group[0].dep.target.module]: group for group in groups}


def kept_by_structure(graph: Any) -> dict[str, str]:
    """The layers that keep their width, and why: they feed the model's output or a layer of fixed width, or are one."""
    names = {module: name for name, module in graph.model.named_modules()}
    kept = {
        name: f"{type(module).__name__}: its forward relies on its width"
        for module, name in names.items()
        if isinstance(module, FIXED_WIDTH)
    }
    for group in graph.get_all_groups(root_module_types=PRUNABLE):
        widths = [dep.target for dep, _ in group if graph.is_out_channel_pruning_fn(dep.handler)]
        fixed = [dep.target.module for dep, _ in group if isinstance(dep.target.module, FIXED_WIDTH)]
        if any(not node.outputs for node in widths):
            reason = "it gives the model's output"
        elif fixed:
            reason = f"its width is coupled with that of {names[fixed[0]]!r} ({type(fixed[0]).__name__})"
        else:
            continue
        kept.update({names[node.module]: reason for node in widths if isinstance(node.module, PRUNABLE)})
    return kept


def channel_groups(graph: Any, group: Any) -> int:
    """In how many parts of equal size the channels of a group come, as those of a grouped convolution do."""
    counts = [1]
    for dep, _ in group:
        layer = dep.target.module
        if isinstance(layer, nn.Module) and not _is_depthwise(layer):
            pruner = graph.get_pruner_of_module(layer)
            out = graph.is_out_channel_pruning_fn(dep.handler)
            counts.append(pruner.get_out_channel_groups(layer) if out else pruner.get_in_channel_groups(layer))
    return max(counts)


class Channels:
    """The convolution and linear weights that go with each channel of a group, wherever they are."""

    def __init__(self, graph: Any, group: Any) -> None:
        self.num_channels = len(group[0].idxs)
        self._parts = [
            (
                item.dep.target.module,
                graph.is_out_channel_pruning_fn(item.dep.handler),
                torch.tensor(item.idxs),
                torch.tensor(item.root_idxs),
            )
            for item in group
            if isinstance(item.dep.target.module, WEIGHTED) and None not in item.root_idxs
        ]

    def rms(self) -> tuple[Tensor, Tensor]:
        """The root mean square of each channel's weights, and their number: two vectors. Gradients flow through."""
        squares, counts = torch.zeros(self.num_channels), torch.zeros(self.num_channels)
        for layer, is_out, rows, channels in self._parts:
            weight = layer.weight.transpose(0, 1) if getattr(layer, "transposed", False) else layer.weight
            by_row = (weight if is_out else weight.transpose(0, 1)).flatten(1)
            if not is_out:
                by_row = by_row.repeat(getattr(layer, "groups", 1), 1)
            squares = squares.index_add(0, channels, by_row.square().sum(1)[rows])
            counts = counts.index_add(0, channels, torch.full((len(rows),), float(by_row.shape[1])))
        return (squares / counts + 1e-12).sqrt(), counts  # the root has no gradient at 0


def _is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.modules.conv._ConvNd) and layer.groups == layer.out_channels


def _forward(model: nn.Module, example: Tensor) -> Tensor:
    """The forward that is traced: recurrent layers are one operation in it, where autograd sees one for each time step.

    (Left to itself, torch-pruning also tries `model(*example)` first: the rows of a batch as separate arguments.)
    """
    layers = [m for m in model.modules() if isinstance(m, nn.RNNBase)]
    for layer in layers:
        layer.forward = partial(_recurrent_stand_in, layer)
    try:
        outputs: Tensor = model(example)
        return outputs
    finally:
        for layer in layers:
            del layer.forward


def _recurrent_stand_in(layer: nn.RNNBase, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """What the layer returns, in shape; the values are zeros."""
    outputs, hidden, cell = _OneOperation.apply(inputs, layer)  # type: ignore[no-untyped-call]
    return outputs, (hidden, cell) if isinstance(layer, nn.LSTM) else hidden


class _OneOperation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: nn.RNNBase) -> tuple[Tensor, Tensor, Tensor]:
        directions = 2 if layer.bidirectional else 1
        batch = inputs.shape[:-1][0 if layer.batch_first else 1 :][: inputs.ndim - 2]
        hidden = (directions * layer.num_layers, *batch)
        width = layer.proj_size or layer.hidden_size
        return (
            inputs.new_zeros(*inputs.shape[:-1], directions * width),
            inputs.new_zeros(*hidden, width),
            inputs.new_zeros(*hidden, layer.hidden_size),
        )


class _Recurrent(torch_pruning.pruner.function.BasePruningFunc):  # type: ignore[misc]
    """How wide a recurrent layer is. None is ever pruned: `kept_by_structure` sees to that."""

    def prune_out_channels(self, layer: nn.RNNBase, idxs: Sequence[int]) -> nn.Module:
        raise NotImplementedError(f"{type(layer).__name__} keeps its width")

    def prune_in_channels(self, layer: nn.RNNBase, idxs: Sequence[int]) -> nn.Module:
        raise NotImplementedError(f"{type(layer).__name__} keeps its width")

    def get_out_channels(self, layer: nn.RNNBase) -> int:
        return (layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1)

    def get_in_channels(self, layer: nn.RNNBase) -> int:
        return layer.input_size


def _recurrent_layers() -> dict[type[nn.Module], _Recurrent]:
    """torch-pruning takes the weights of a GRU for loose parameters to prune, and a two-way LSTM for half as wide."""
    return {kind: _Recurrent() for kind in (nn.LSTM, nn.GRU, nn.RNN)}
