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
from heliostat.compression.prune.masks import Scope, Sparsity, check_sparsity
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
    sparsity: Sparsity | None = None,
    of: Mapping[str, int] | None = None,
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
        sparsity: the fraction of channels to remove, in [0, 1), or for each layer by its name, to the nearest channel.
        of: `widths` of the model before earlier cuts, which `sparsity` is then of.
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
    for fraction in sparsity.values() if isinstance(sparsity, Mapping) else [sparsity or 0]:
        check_sparsity(fraction)
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
        counts = {name: len(score) for name, score in scores.items()}
        if threshold is None:
            left = _left(scores, sparsity or 0, scope=scope, of=counts if of is None else of)
        else:
            left = {name: int((values >= threshold).sum()) for name, values in scores.items()}
        removed = _lowest(scores, left, round_to=round_to, cause=cause)
        with quiet():
            for name, channels in removed.items():
                size = len(scores[name])
                root = groups[name][0].dep
                everywhere = [part * size + channel for part in range(parts[name]) for channel in channels]
                graph.get_pruning_group(root.target.module, root.handler, everywhere).prune()
        model.zero_grad(set_to_none=True)
    if not removed and sparsity != 0 and not (scores and threshold is None):
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


def widths(
    model: nn.Module, *, example: Tensor, importance: Importance = "magnitude", skip: Sequence[str] = ()
) -> dict[str, int]:
    """The layers that `structured` may take channels from, and how many they have: of a grouped layer, each group.

    Raises SpecError for a pattern that matches no layer.
    """
    kept = skipped(model, skip)
    with ready_to_trace(model):
        graph = dependencies(model, example[:1])
        groups = groups_by_layer(graph, {**kept_by_structure(graph), **kept})
        # Which layers have an importance depends on batch norm alone; that by the loss would need gradients.
        ranked = _scores(groups, "bn_scale" if importance == "bn_scale" else "magnitude")
        return {name: len(score) // channel_groups(graph, groups[name]) for name, score in ranked.items()}


def replay(model: nn.Module, step: Mapping[str, Any]) -> None:
    """Give a freshly built model the shapes of a step's, in place."""
    example = torch.zeros(1, *step["input"]["shape"], dtype=getattr(torch, step["input"]["dtype"]))
    with ready_to_trace(model), quiet():
        dependencies(model, example).load_pruning_history(step["groups"])


def _scores(groups: Mapping[str, Any], importance: Importance) -> dict[str, Tensor]:
    score = IMPORTANCES[importance]()
    found = {name: score(group) for name, group in groups.items()}
    return {name: values.cpu() for name, values in found.items() if values is not None}


def _left(scores: Mapping[str, Tensor], sparsity: Sparsity, *, scope: Scope, of: Mapping[str, int]) -> dict[str, int]:
    """How many channels of each layer stay; `of` is how many there were."""
    if isinstance(sparsity, Mapping):
        return {name: of[name] - round(of[name] * sparsity.get(name, 0.0)) for name in scores}
    if scope == "layer" or not scores:
        return {name: int(of[name] * (1 - sparsity)) for name in scores}
    everything, total = torch.cat(list(scores.values())), sum(of[name] for name in scores)
    num_removed = len(everything) - int(total * (1 - sparsity))
    highest = float("-inf") if num_removed < 1 else float(everything.kthvalue(num_removed).values)
    return {name: int((values > highest).sum()) for name, values in scores.items()}


def _lowest(
    scores: Mapping[str, Tensor], left: Mapping[str, int], *, round_to: int, cause: str
) -> dict[str, list[int]]:
    """The channels to remove from each layer that loses any."""
    removed = {}
    for name, values in scores.items():
        count = len(values)
        remaining = left[name] - left[name] % round_to if left[name] < count else count
        if remaining < 1:
            raise SpecError(f"{cause} leaves the layer {name!r} ({count} channels) empty")
        if remaining < count:
            removed[name] = sorted(values.argsort()[: count - remaining].tolist())
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
