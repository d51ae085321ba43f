"""The proof that two networks compute the same, before anything is trained: on real data, in evaluation and training.

Both run in double precision where they can, so that the tolerance hides no small fault. In training mode dropout and
batch norm are at rest: what is compared there are the branches that only train.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from heliostat.compression.parity import difference
from heliostat.compression.refusal import located

CHECKED_ROWS = 4
"""Rows of real data on which the two networks are compared."""
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
"""The largest difference that passes, relative to the largest value of the output."""
AT_REST = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
"""Layers that draw random numbers, or mix the rows of a batch, in training mode."""


def why_apart(changed: nn.Module, reference: nn.Module, rows: Tensor, *, having: str, like: str) -> str | None:
    """Return why `changed` does not compute what `reference` does, in words; None if it does. Both are used up.

    Args:
        having: what was changed, as in `with fewer channels`.
        like: what the reference is, as in `the masked network`.
    """
    try:
        _outputs(changed, rows[:1], torch.float32)  # most changes that fail do so at once
    except Exception as error:  # the user's forward may raise anything
        return f"the model does not run {having}: {located(error)}"
    for dtype, tolerance in TOLERANCES.items():
        try:
            wanted = _outputs(reference, rows, dtype)
        except Exception:
            if dtype == torch.float32:
                raise
            continue  # a forward that makes tensors of a fixed type does not run in double precision
        if problem := _difference(_outputs(changed, rows, dtype), wanted, tolerance):
            return f"{having} the outputs are not those of {like}: {problem}"
        try:
            wanted = _outputs(reference, rows, dtype, training=True)
        except Exception:
            return None  # a training mode that takes more than inputs
        try:
            found = _outputs(changed, rows, dtype, training=True)
        except Exception as error:  # as above
            return f"the model does not train {having}: {located(error)}"
        problem = _difference(found, wanted, tolerance)
        if not problem or _difference(_outputs(reference, rows, dtype, training=True, seed=1), wanted, tolerance):
            return None  # the same, or random numbers that no seed makes the same
        return f"{having} the outputs in training are not those of {like}: {problem}"
    return None


def find_sound(names: Sequence[str], try_: Callable[[list[str]], str | None]) -> tuple[list[str], dict[str, str]]:
    """Return the largest part of `names` that passes, found by halving, and why the others do not.

    Args:
        try_: tries some of the names together; returns why they fail, None if they pass. It is called last for what
            is returned, or for something that failed.
    """
    sound: list[str] = []
    reasons: dict[str, str] = {}
    pending = [list(names)] if names else []
    while pending:
        more = pending.pop()
        reason = try_([*sound, *more])
        if reason is None:
            sound.extend(more)
        elif len(more) == 1:
            reasons[more[0]] = reason
        else:
            half = len(more) // 2
            pending += [more[half:], more[:half]]  # the first half is tried next
    return sound, reasons


def train_at_rest(model: nn.Module, training: bool) -> None:
    """Set a model's mode; in training mode dropout draws nothing and batch norm leaves its statistics as they are."""
    model.train(training)
    for module in model.modules():
        if isinstance(module, AT_REST):
            module.eval()


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
