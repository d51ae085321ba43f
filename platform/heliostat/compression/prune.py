"""Two ways to prune. `magnitude` sets single weights to zero and leaves every shape as it is: the file compresses, but
no dense kernel is faster. `structured` removes whole channels, together with everything that depends on them, so that
the network really gets smaller.

What `structured` did is a history of plain numbers. `replay` does the same to a freshly built model, and so a pruned
network is saved as its constructor, its history and its weights, never as a pickled object. A history is a list of
steps, each a mapping with an `op` that `REPLAY` has a function for.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn

from heliostat.compression.quiet import quiet
from heliostat.errors import SpecError, StageError, nearest

History = list[dict[str, Any]]

PRUNABLE = (nn.modules.conv._ConvNd, nn.Linear)
FIXED_WIDTH = (nn.RNNBase, nn.MultiheadAttention)
"""Layers that `structured` neither prunes nor prunes the neighbours of where that would change their width."""

# --- unstructured ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Masks:
    """Which weights are pruned: for each parameter name, a boolean tensor of its shape, true where it is zero."""

    pruned: Mapping[str, Tensor]

    def apply(self, model: nn.Module) -> None:
        """Set the pruned weights of `model` to exactly zero. Call it after every optimizer step of a fine-tuning."""
        with torch.no_grad():
            for name, pruned in self.pruned.items():
                weight = model.get_parameter(name)
                weight.masked_fill_(pruned.to(weight.device), 0)

    @property
    def sparsity(self) -> float:
        """The fraction of the masked parameters' weights that is zero."""
        return sum(int(p.sum()) for p in self.pruned.values()) / sum(p.numel() for p in self.pruned.values())


def magnitude(model: nn.Module, *, sparsity: float, skip: Sequence[str] = ()) -> Masks:
    """Set the smallest weights of all convolution and linear layers, ranked together by |w|, to zero.

    Biases, normalisation and recurrent weights are left alone. The masks are applied to `model` at once.

    Args:
        sparsity: the fraction of these weights to set to zero, in [0, 1).
        skip: patterns (as of `fnmatch`) of names of layers to leave alone.

    Raises:
        SpecError: sparsity outside [0, 1), a pattern that matches no layer, a layer left without any weight.
        StageError: the model has no convolution or linear layer.
    """
    _check_sparsity(sparsity)
    skipped = _skipped(model, skip)
    weights = {
        f"{name}.weight" if name else "weight": module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, PRUNABLE) and module not in skipped
    }
    if not weights:
        raise StageError("there is nothing to prune: no convolution or linear layer that is not skipped")
    ranks = torch.cat([w.abs().flatten() for w in weights.values()])
    smallest = torch.zeros_like(ranks, dtype=torch.bool)
    smallest[torch.topk(ranks, round(sparsity * ranks.numel()), largest=False).indices] = True
    parts = torch.split(smallest, [w.numel() for w in weights.values()])
    masks = Masks({name: part.view(w.shape) for (name, w), part in zip(weights.items(), parts)})
    for name, pruned in masks.pruned.items():
        if pruned.all():
            raise SpecError(f"sparsity {sparsity} leaves the layer {name.removesuffix('.weight')!r} without any weight")
    masks.apply(model)
    return masks


# --- structured -----------------------------------------------------------------------------------------------------


def structured(
    model: nn.Module, *, example: Tensor, sparsity: float, skip: Sequence[str] = (), round_to: int | None = None
) -> tuple[nn.Module, History]:
    """A smaller copy of `model`, and the history that `replay` rebuilds its shapes from.

    Removes the fraction `sparsity` of the channels of every convolution and linear layer, those of smallest group L2
    norm first, and what depends on them: the inputs of the layers after it, batch norm, the other branch of a residual
    connection, depthwise convolutions (DepGraph, Fang et al. 2023, https://arxiv.org/abs/2301.12900). The model's
    outputs stay as they are, and so do recurrent layers and attention, whose widths their own `forward` relies on.

    Args:
        example: a batch that the model takes; its values do not matter.
        sparsity: the fraction of channels removed per layer, in [0, 1).
        skip: patterns (as of `fnmatch`) of names of layers whose outputs keep their width.
        round_to: keep a multiple of this many channels; None keeps any number.

    Raises:
        SpecError: sparsity outside [0, 1), a pattern that matches no layer, a layer that would be left empty.
        StageError: no layer can be pruned, or the model does not run any more when it is.
    """
    _check_sparsity(sparsity)
    model = copy.deepcopy(model)
    example = example[:1]
    kept = {name: f"matches the pattern {pattern!r}" for pattern in skip for name in _matching(model, pattern)}
    names = {module: name for name, module in model.named_modules()}
    with _ready_to_trace(model):
        graph = _dependencies(model, example)
        kept |= _kept_by_structure(graph, names)
        with quiet():
            pruner = torch_pruning.pruner.BasePruner(
                model,
                example,
                forward_fn=_forward,
                customized_pruners=_recurrent_layers(),
                importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
                pruning_ratio=sparsity,
                round_to=round_to,
                ignored_layers=[model.get_submodule(name) for name in kept],
                in_channel_groups={},  # the defaults are shared between all pruners of the process, and written to
                out_channel_groups={},
                num_heads={},
                root_module_types=list(PRUNABLE),
            )
        _check_none_empty(pruner, names, sparsity)
        with quiet():
            pruner.step()
    groups = [[name, bool(is_out), [int(i) for i in indices]] for name, is_out, indices in pruner.pruning_history()]
    if sparsity and not groups:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in kept.items())
        raise StageError(f"structured pruning finds no channel that it may remove ({reasons})")
    _check_runs(model, example)
    step = {
        "op": "structured",
        "sparsity": sparsity,
        "input": {"shape": list(example.shape[1:]), "dtype": str(example.dtype).removeprefix("torch.")},
        "kept": kept,
        "groups": groups,
    }
    return model, [step]


def replay(model: nn.Module, history: Sequence[Mapping[str, Any]]) -> nn.Module:
    """Give a freshly built model the shapes that `history` led to, in place. The weights are to be loaded after it."""
    for step in history:
        REPLAY[step["op"]](model, step)
    return model


def _replay_structured(model: nn.Module, step: Mapping[str, Any]) -> None:
    example = torch.zeros(1, *step["input"]["shape"], dtype=getattr(torch, step["input"]["dtype"]))
    with _ready_to_trace(model), quiet():
        _dependencies(model, example).load_pruning_history(step["groups"])


REPLAY: dict[str, Callable[[nn.Module, Mapping[str, Any]], None]] = {"structured": _replay_structured}
"""What each kind of step does to a freshly built model."""


# --- parts of the above ---------------------------------------------------------------------------------------------


def _check_sparsity(sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise SpecError(f"sparsity {sparsity} is not in [0, 1)")


def _matching(model: nn.Module, pattern: str) -> list[str]:
    layers = [name for name, _ in model.named_modules() if name]
    found = [name for name in layers if fnmatchcase(name, pattern)]
    if not found:
        raise SpecError(f"skip: {pattern!r} matches no layer{nearest(pattern, layers)}")
    return found


def _skipped(model: nn.Module, skip: Sequence[str]) -> set[nn.Module]:
    """The modules whose names match, and all that is inside them."""
    tops = [model.get_submodule(name) for pattern in skip for name in _matching(model, pattern)]
    return {module for top in tops for module in top.modules()}


@contextmanager
def _ready_to_trace(model: nn.Module) -> Iterator[None]:
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


def _dependencies(model: nn.Module, example: Tensor) -> Any:
    with quiet():
        return torch_pruning.DependencyGraph().build_dependency(
            model, example_inputs=example, forward_fn=_forward, customized_pruners=_recurrent_layers()
        )


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
    """How wide a recurrent layer is. None is ever pruned: `_kept_by_structure` sees to that."""

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


def _kept_by_structure(graph: Any, names: Mapping[nn.Module, str]) -> dict[str, str]:
    """The layers that keep their width, and why: they feed the model's output or a layer of fixed width."""
    kept = {}
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


def _check_none_empty(pruner: Any, names: Mapping[nn.Module, str], sparsity: float) -> None:
    for group in pruner.DG.get_all_groups(ignored_layers=pruner.ignored_layers, root_module_types=PRUNABLE):
        module = group[0].dep.target.module
        channels = pruner.DG.get_out_channels(module) // pruner._get_channel_groups(group)
        remaining = int(channels * (1 - sparsity))
        if pruner.round_to:
            remaining -= remaining % pruner.round_to
        if remaining < 1:
            raise SpecError(f"sparsity {sparsity} leaves the layer {names[module]!r} ({channels} channels) empty")


def _check_runs(model: nn.Module, example: Tensor) -> None:
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(example)
    except (RuntimeError, ValueError, IndexError) as error:
        raise StageError(
            f"the model does not run with fewer channels: {error}. If its forward has a layer's width written into it, "
            "read the width off the tensor there, or name that layer in `skip`"
        ) from error
    finally:
        model.train(training)
