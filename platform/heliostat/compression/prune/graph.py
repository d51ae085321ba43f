"""What depends on what in a network: torch-pruning's dependency graph (DepGraph, Fang et al. 2023,
https://arxiv.org/abs/2301.12900), read off one forward.

A group is all that has to go when a channel of one layer goes. Recurrent layers and attention are made one operation of
fixed width, since their own `forward` relies on it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn

from heliostat.compression.layers import WEIGHTED
from heliostat.compression.proof import train_at_rest
from heliostat.compression.prune.dependency import Graph
from heliostat.compression.quiet import quiet


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


def dependencies(model: nn.Module, example: Tensor, *, training: bool = False) -> Graph:
    """The graph of a model that is ready to trace, of its forward in training mode or not."""
    with quiet():
        return Graph().build_dependency(
            model,
            example_inputs=example,
            forward_fn=partial(_forward, training=training),
            customized_pruners=_recurrent_layers(),
        )


def trains_more(model: nn.Module, example: Tensor) -> bool:
    """Whether layers take part in training that do not in evaluation, such as a head of an auxiliary loss."""
    called: dict[bool, set[nn.Module]] = {False: set(), True: set()}
    mode = model.training

    def note(module: nn.Module, given: Any) -> None:
        called[model.training].add(module)

    hooks = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, WEIGHTED)]
    try:
        for training in called:
            train_at_rest(model, training)
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                model(example)
    except Exception:  # a training mode that takes more than inputs
        return False
    finally:
        model.train(mode)
        for hook in hooks:
            hook.remove()
    return called[True] > called[False]


class Channels:
    """The convolution and linear weights that go with each channel of a group of the graph, wherever they are."""

    def __init__(self, graph: Graph, group: Any) -> None:
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


def _forward(model: nn.Module, example: Tensor, *, training: bool) -> Tensor:
    """The forward that is traced: recurrent layers are one operation in it, where autograd sees one for each time step.

    (Left to itself, torch-pruning also tries `model(*example)` first: the rows of a batch as separate arguments.)
    """
    train_at_rest(model, training)
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
    """How wide a recurrent layer is. None is ever pruned: `couplings` sees to that."""

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
