"""Whole channels removed, and everything that depends on them: the network really gets smaller.

What was removed is a step of plain numbers, from which `replay` gives a freshly built model the same shapes. The graph
of dependencies, and what the importance of a channel is, are torch-pruning's.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch_pruning
from torch import Tensor, nn

from heliostat.compression.layers import skipped
from heliostat.compression.prune.graph import (
    Channels,
    channel_groups,
    dependencies,
    groups_by_layer,
    kept_by_structure,
    ready_to_trace,
)
from heliostat.compression.prune.masks import Scope, check_sparsity
from heliostat.compression.quiet import quiet
from heliostat.errors import SpecError, StageError

Importance = Literal["magnitude", "taylor", "bn_scale"]
Backward = Callable[[nn.Module], None]

IMPORTANCES: dict[str, Callable[[], Callable[[Any], Tensor | None]]] = {
    "magnitude": lambda: torch_pruning.importance.GroupMagnitudeImportance(p=2),
    "taylor": torch_pruning.importance.GroupTaylorImportance,
    "bn_scale": torch_pruning.importance.BNScaleImportance,
}


def structured(
    model: nn.Module,
    *,
    example: Tensor,
    sparsity: float | None = None,
    threshold: float | None = None,
    importance: Importance = "magnitude",
    backward: Backward | None = None,
    scope: Scope = "layer",
    skip: Sequence[str] = (),
    round_to: int = 1,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A smaller copy of `model`, and the history that rebuilds its shapes.

    Removes the least important channels of every convolution, linear layer and embedding, and what depends on them: the
    inputs of the layers after it, batch norm, the other branch of a residual connection, depthwise convolutions. The
    model's outputs stay as they are, and so do recurrent layers and attention, whose `forward` relies on their widths.

    Args:
        example: a batch that the model takes; its values do not matter.
        sparsity: the fraction of channels to remove, in [0, 1).
        threshold: instead, remove the channels the root mean square of whose weights is below: what a training with a
            group lasso is followed by.
        importance: `magnitude`, the group's L2 norm; `taylor`, the first-order change of the loss when the channel goes
            (Molchanov et al. 2019, https://arxiv.org/abs/1906.10771); `bn_scale`, the batch norm's scale after it (Liu
            et al. 2017, https://arxiv.org/abs/1708.06519), which leaves layers without one alone.
        backward: for `taylor`, adds the loss's gradients to the parameters of the model that it is given.
        scope: take the fraction from each layer, or rank the channels of all layers together (`global`).
        skip: patterns (as of `fnmatch`) of names of layers whose outputs keep their width.
        round_to: keep a multiple of this many channels.

    Raises:
        SpecError: sparsity outside [0, 1), a pattern that matches no layer, a layer that would be left empty.
        StageError: no channel can be removed, or the model does not run any more when it is.
    """
    if sparsity is not None:
        check_sparsity(sparsity)
    model = copy.deepcopy(model)
    example = example[:1]
    kept = skipped(model, skip)
    with ready_to_trace(model):
        graph = dependencies(model, example)
        kept = {**kept_by_structure(graph), **kept}
        groups = groups_by_layer(graph, kept)
        if backward is not None:
            backward(model)
        parts = {name: channel_groups(graph, group) for name, group in groups.items()}
        if threshold is None:
            found = _scores(groups, importance)
            kept |= dict.fromkeys(groups.keys() - found.keys(), "no batch norm scales its channels")
        else:
            found = {name: Channels(graph, group).rms()[0].detach() for name, group in groups.items()}
        scores = {name: score.view(parts[name], -1).mean(0) for name, score in found.items()}
        cause = f"sparsity {sparsity}" if threshold is None else f"threshold {threshold}"
        removed = _lowest(scores, sparsity=sparsity, threshold=threshold, scope=scope, round_to=round_to, cause=cause)
        with quiet():
            for name, channels in removed.items():
                size = len(scores[name])
                root = groups[name][0].dep
                everywhere = [part * size + channel for part in range(parts[name]) for channel in channels]
                graph.get_pruning_group(root.target.module, root.handler, everywhere).prune()
        model.zero_grad(set_to_none=True)
    if not removed and sparsity != 0:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in kept.items())
        raise StageError(f"structured pruning finds no channel that it may remove at {cause} ({reasons})")
    _check_runs(model, example)
    step = {
        "op": "structured",
        "input": {"shape": list(example.shape[1:]), "dtype": str(example.dtype).removeprefix("torch.")},
        "kept": kept,
        "groups": [
            [name, bool(is_out), [int(i) for i in channels]] for name, is_out, channels in graph.pruning_history()
        ],
    }
    return model, [step]


def replay(model: nn.Module, step: Mapping[str, Any]) -> None:
    """Give a freshly built model the shapes of a step's, in place."""
    example = torch.zeros(1, *step["input"]["shape"], dtype=getattr(torch, step["input"]["dtype"]))
    with ready_to_trace(model), quiet():
        dependencies(model, example).load_pruning_history(step["groups"])


def _scores(groups: Mapping[str, Any], importance: Importance) -> dict[str, Tensor]:
    score = IMPORTANCES[importance]()
    found = {name: score(group) for name, group in groups.items()}
    return {name: values.cpu() for name, values in found.items() if values is not None}


def _lowest(
    scores: Mapping[str, Tensor],
    *,
    sparsity: float | None,
    threshold: float | None,
    scope: Scope,
    round_to: int,
    cause: str,
) -> dict[str, list[int]]:
    """The channels to remove from each layer that loses any."""
    counts = {name: len(values) for name, values in scores.items()}
    if scores and scope == "global" and threshold is None:
        everything = torch.cat(list(scores.values()))
        num_removed = len(everything) - int(len(everything) * (1 - (sparsity or 0)))
        threshold = float("-inf") if not num_removed else float(everything.kthvalue(num_removed).values)
        left = {name: int((values > threshold).sum()) for name, values in scores.items()}
    elif threshold is not None:
        left = {name: int((values >= threshold).sum()) for name, values in scores.items()}
    else:
        left = {name: int(count * (1 - (sparsity or 0))) for name, count in counts.items()}
    removed = {}
    for name, values in scores.items():
        remaining = left[name] - left[name] % round_to if left[name] < counts[name] else left[name]
        if remaining < 1:
            raise SpecError(f"{cause} leaves the layer {name!r} ({counts[name]} channels) empty")
        if remaining < counts[name]:
            removed[name] = sorted(values.argsort()[: counts[name] - remaining].tolist())
    return removed


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
