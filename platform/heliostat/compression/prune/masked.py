"""The proof of a cut: on real data, the network that is left computes what the masked network does.

A masked network has every shape of the original, and zero in all that a cut takes away: the weights that make a channel
and those that read it. Both run in double precision where they can, so that the tolerance hides no small fault, and in
training mode too, with dropout and batch norm at rest, which shows the branches that only train.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from heliostat.compression.parametrizations import copied
from heliostat.compression.parity import difference
from heliostat.compression.prune.graph import train_at_rest
from heliostat.compression.prune.steps import Positions, cut
from heliostat.compression.refusal import located
from heliostat.errors import StageError

CHECKED_ROWS = 4
"""So many rows of real data the two networks are compared on."""
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
"""The largest difference that passes, relative to the largest value of the output."""


def proven_cut(
    model: nn.Module, step: Mapping[str, Any], rows: Tensor, *, norms: Sequence[str] = ()
) -> tuple[nn.Module, str | None]:
    """Return a copy of `model` after the step, and why it is not the masked network on `rows`; None if it is.

    `norms` normalise over channels of which some go: in the masked network they do so over the remaining ones.
    """
    try:
        smaller, positions = cut(model, step)
    except StageError as error:
        return model, f"{error}"
    except Exception as error:  # the library's arithmetic fails in many ways
        return model, f"torch-pruning cannot remove its channels: {type(error).__name__}: {error}"
    return smaller, _why_apart(copied(smaller), masked(model, positions, norms), rows)


def masked(model: nn.Module, positions: Positions, norms: Sequence[str] = ()) -> nn.Module:
    """Return a copy of `model` with zero wherever its parameters are not among the positions that stay."""
    copy = copied(model)
    parameters = dict(copy.named_parameters(remove_duplicate=False))
    for name, where in positions.items():
        stays = torch.zeros(parameters[name].numel(), dtype=torch.bool)
        stays[where.flatten()] = True
        parameters[name].data.masked_fill_(~stays.view(parameters[name].shape), 0)
    for name in norms:
        norm, weight = copy.get_submodule(name), positions.get(f"{name}.weight")
        if weight is not None:
            norm.forward = partial(_over_remaining, norm, weight)
    return copy


def _over_remaining(norm: nn.Module, channels: Tensor, inputs: Tensor) -> Tensor:
    """Layer norm, or group norm of one group, over some of the channels; the others are zero."""
    dim = -1 if isinstance(norm, nn.LayerNorm) else 1
    assert isinstance(norm, (nn.LayerNorm, nn.GroupNorm))
    weight, bias = (None if part is None else part[channels] for part in (norm.weight, norm.bias))
    remaining = inputs.index_select(dim, channels)
    if isinstance(norm, nn.LayerNorm):
        found = functional.layer_norm(remaining, (len(channels),), weight, bias, norm.eps)
    else:
        found = functional.group_norm(remaining, 1, weight, bias, norm.eps)
    return torch.zeros_like(inputs).index_copy(dim, channels, found)


def _why_apart(smaller: nn.Module, masked: nn.Module, rows: Tensor) -> str | None:
    """Why the two networks are not one, in words. Both are used up."""
    try:
        _outputs(smaller, rows[:1], torch.float32)  # most cuts that fail do so at once
    except Exception as error:  # the user's forward may raise anything
        return f"the model does not run with fewer channels: {located(error)}"
    for dtype, tolerance in TOLERANCES.items():
        try:
            wanted = _outputs(masked, rows, dtype)
        except Exception:
            if dtype == torch.float32:
                raise
            continue  # a forward that makes tensors of a fixed type does not run in double precision
        found = _outputs(smaller, rows, dtype)
        if problem := _difference(found, wanted, tolerance):
            return f"without its channels the outputs are not those of the masked network: {problem}"
        return _why_apart_in_training(smaller, masked, rows, dtype)
    return None


def _why_apart_in_training(smaller: nn.Module, masked: nn.Module, rows: Tensor, dtype: torch.dtype) -> str | None:
    try:
        wanted = _outputs(masked, rows, dtype, training=True)
    except Exception:
        return None  # a training mode that takes more than inputs
    try:
        found = _outputs(smaller, rows, dtype, training=True)
    except Exception as error:  # as above
        return f"the model does not train with fewer channels: {located(error)}"
    problem = _difference(found, wanted, TOLERANCES[dtype])
    if not problem or _difference(_outputs(masked, rows, dtype, training=True, seed=1), wanted, TOLERANCES[dtype]):
        return None  # the same, or random numbers that no seed makes the same
    return f"without its channels the outputs in training are not those of the masked network: {problem}"


def _outputs(model: nn.Module, rows: Tensor, dtype: torch.dtype, *, training: bool = False, seed: int = 0) -> list[Any]:
    train_at_rest(model.to(dtype), training)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return pytree.tree_leaves(model(rows.to(dtype) if rows.is_floating_point() else rows))


def _difference(found: Sequence[Any], wanted: Sequence[Any], tolerance: float) -> str | None:
    """How far apart the outputs are, in words; None if they are the same within the tolerance."""
    if len(found) != len(wanted):
        return f"{len(found)} tensors instead of {len(wanted)}"
    for one, other in zip(found, wanted):
        if not isinstance(other, Tensor):
            continue
        if one.shape != other.shape:
            return f"their shape is {tuple(one.shape)} instead of {tuple(other.shape)}"
        finite = other[other.isfinite()].abs() if other.is_floating_point() else other
        largest = float(finite.max()) if finite.numel() else 0.0
        if not difference(one, other) <= tolerance * largest:
            return f"they differ by {difference(one, other):.3g}, where the largest is {largest:.3g}"
    return None
