"""Whole channels removed, and everything that depends on them: the network really gets smaller.

Every cut is proven before it is given back: on real data the smaller network computes what the masked one does
(`masked`). A group of channels for which it does not is left alone, with the reason.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from heliostat.compression.layers import skipped
from heliostat.compression.prune.masks import Scope, Sparsity, check_sparsity
from heliostat.compression.prune.plan import Backward, Plan, Score, Units, cuttable
from heliostat.errors import SpecError, StageError

Importance = Literal["magnitude", "taylor", "bn_scale"]

WIDTH_HINT = (
    ". If its forward has a layer's width written into it, read the width off the tensor there, or name that layer in "
    "`skip`"
)


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
    kept: Mapping[str, str] = MappingProxyType({}),
    required: bool = True,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A smaller copy of `model`, and the history that rebuilds its shapes.

    Removes the least important channels of every convolution, linear layer and embedding, and what depends on them: the
    inputs of the layers after it, batch norm, the other branch of a residual connection, depthwise convolutions. The
    model's outputs stay as they are, and so do recurrent layers and attention, whose `forward` relies on their widths,
    and every group without whose channels the model is not the masked network on `example`.

    Layer norm over the channels of a group never equals that of a masked network. Such groups are cut only if no other
    group can be, and the step says so under `approximate`.

    Args:
        example: a batch of real data, on which the cut is proven.
        sparsity: the fraction of channels to remove, in [0, 1), or for each layer by its name, to the nearest channel.
            Where channels go several at a time, no more than the fraction goes.
        of: `widths` of the model before earlier cuts, which `sparsity` is then of; other layers keep theirs.
        threshold: instead, remove the channels the root mean square of whose weights is below: what a training with a
            group lasso is followed by.
        importance: `magnitude`, the group's L2 norm; `taylor`, the first-order change of the loss when the channel goes
            (Molchanov et al. 2019, https://arxiv.org/abs/1906.10771); `bn_scale`, the batch norm's scale after it (Liu
            et al. 2017, https://arxiv.org/abs/1708.06519), which leaves layers without one alone.
        backward: for `taylor`, adds the loss's gradients to the parameters of the model that it is given.
        scope: take the fraction from each layer, or rank the channels of all layers together (`global`).
        skip: patterns (as of `fnmatch`) of names of layers whose outputs keep their width.
        round_to: keep a multiple of this many channels.
        kept: layers to leave alone, with the reasons: those of an earlier cut, which are not tried again.
        required: whether it is an error that no channel can go.

    Raises:
        SpecError: sparsity outside [0, 1), a pattern that matches no layer, a layer that would be left empty.
        StageError: no channel can be removed; it names every layer with the reason.
    """
    for fraction in sparsity.values() if isinstance(sparsity, Mapping) else [sparsity or 0]:
        check_sparsity(fraction)
    plan = Plan.of(model, example, {**skipped(model, skip), **kept})
    plan.score("size" if threshold is not None else importance, backward)
    for wanted in (of, sparsity):
        if isinstance(wanted, Mapping):
            plan.scores = {name: scores for name, scores in plan.scores.items() if name in wanted}
    cause = f"sparsity {sparsity}" if threshold is None else f"threshold {threshold}"

    def chosen(names: Sequence[str]) -> Units:
        scores = {name: plan.scores[name] for name in names}
        counts = {name: len(score) for name, score in scores.items()}
        if threshold is not None:
            left = {name: int((values >= threshold).sum()) for name, values in scores.items()}
        else:
            sizes = {name: plan.groups[name].unit_size for name in names}
            left = _left(scores, sparsity or 0, scope=scope, of=counts if of is None else of, sizes=sizes)
        return _lowest(scores, left, round_to=round_to, cause=cause)

    smaller, step = plan.cut(chosen)
    cut = {name for name, _, _ in step["groups"]}
    for name in plan.scores.keys() - cut if of is None else ():
        if (size := plan.groups[name].unit_size) > 1:
            step["kept"] |= dict.fromkeys(plan.groups[name].members, f"{size} of its channels go at a time: too many")
    if required and not step["groups"] and sparsity != 0 and of is None and not isinstance(sparsity, Mapping):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in plan.kept.items())
        hint = WIDTH_HINT if "does not run with fewer" in reasons else ""
        raise StageError(f"structured pruning finds no channel that it may remove at {cause} ({reasons}){hint}")
    return smaller, [step]


def widths(
    model: nn.Module, *, example: Tensor, importance: Importance = "magnitude", skip: Sequence[str] = ()
) -> dict[str, int]:
    """The layers that `structured` may take channels from, and how many units of channels each has.

    A unit is one channel, or the channels that go at a time, such as a group of a group norm.

    Raises SpecError for a pattern that matches no layer.
    """
    # Which layers have an importance depends on batch norm alone; that by the loss would need gradients.
    score: Score = "bn_scale" if importance == "bn_scale" else "magnitude"
    return {name: len(group.units) for name, group in cuttable(model, example=example, score=score, skip=skip).items()}


def _left(
    scores: Mapping[str, Tensor], sparsity: Sparsity, *, scope: Scope, of: Mapping[str, int], sizes: Mapping[str, int]
) -> dict[str, int]:
    """How many units of each layer stay; `of` is how many there were, `sizes` how many channels a unit has."""
    if isinstance(sparsity, Mapping):
        return {name: of[name] - round(of[name] * sparsity.get(name, 0.0)) for name in scores}
    if scope == "layer" or not scores:  # to the next channel, but not by several at once beyond the fraction
        return {
            name: int(of[name] * (1 - sparsity)) if sizes[name] == 1 else of[name] - int(of[name] * sparsity + 1e-9)
            for name in scores
        }
    everything, total = torch.cat(list(scores.values())), sum(of[name] for name in scores)
    num_removed = len(everything) - int(total * (1 - sparsity))
    highest = float("-inf") if num_removed < 1 else float(everything.kthvalue(num_removed).values)
    return {name: int((values > highest).sum()) for name, values in scores.items()}


def _lowest(
    scores: Mapping[str, Tensor], left: Mapping[str, int], *, round_to: int, cause: str
) -> dict[str, list[int]]:
    """The units to remove from each layer that loses any."""
    removed = {}
    for name, values in scores.items():
        count = len(values)
        remaining = left[name] - left[name] % round_to if left[name] < count else count
        if remaining < 1:
            raise SpecError(f"{cause} leaves the layer {name!r} ({count} channels) empty")
        if remaining < count:
            removed[name] = sorted(values.argsort()[: count - remaining].tolist())
    return removed
