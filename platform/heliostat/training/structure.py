"""What a value consists of, in words, and what is required of samples, outputs and losses.

Inputs, targets and outputs are one tensor each. Whatever else a sample, a model or a loss gives is refused with its
structure, such as `{input_ids: int64 (16,), attention_mask: int64 (16,)}`, where it first appears.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from heliostat.errors import StageError

SHOWN = 8
"""The number of items shown of a collection."""


def describe(value: Any) -> str:
    """The types, dtypes and shapes of a value and of what it holds."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"array {value.dtype} {value.shape}"
    if value is None:
        return "None"
    name = type(value).__name__
    if dataclasses.is_dataclass(value) and not isinstance(value, type | Mapping):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif hasattr(value, "_fields"):  # a named tuple
        value = dict(zip(value._fields, value))
    if isinstance(value, Mapping):
        prefix = "" if name == "dict" else f"{name} "
        return f"{prefix}{{{_listed([f'{key}: {describe(item)}' for key, item in _some(value.items())], len(value))}}}"
    if isinstance(value, tuple | list):
        inner = _listed([describe(item) for item in _some(value)], len(value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    return name


def _some(items: Any) -> list[Any]:
    return list(items)[:SHOWN]


def _listed(shown: Sequence[str], count: int) -> str:
    return ", ".join([*shown, *([f"… {count} in all"] if count > len(shown) else [])])


def require_sample(sample: Any, *, split: str) -> None:
    """Raise StageError unless a sample is a tuple (inputs, targets, ...) with one tensor, array or number for each."""
    place = f"task.data: a sample of {split!r}"
    if not isinstance(sample, tuple | list) or len(sample) < 2:
        raise StageError(
            f"{place} is {describe(sample)}; it must be a tuple (inputs, targets), of one tensor, array or number each"
        )
    for name, value, where in (("inputs", sample[0], "the model's forward"), ("targets", sample[1], "the loss")):
        if not _becomes_tensor(value):
            raise StageError(
                f"{place} has {name}: {describe(value)}; they must be one tensor, array or number. Until other "
                f"structures are taken, put all of them into one tensor (torch.stack, torch.cat) and part it in {where}"
            )


def _becomes_tensor(value: Any) -> bool:
    """Whether torch's batches have one tensor of it."""
    if isinstance(value, np.ndarray | np.generic):
        return value.dtype.kind in "biufc"
    return isinstance(value, Tensor | bool | int | float)


def collate(samples: list[Any]) -> Any:
    """Make a batch as torch does by default. Raises StageError with the structure of the samples if it cannot."""
    try:
        return default_collate(samples)
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        found = list(dict.fromkeys(describe(sample) for sample in samples))
        others = f" and {found[1]}" if len(found) > 1 else ""
        raise StageError(
            f"task.data: {len(samples)} samples do not make a batch; among them are {found[0]}{others}. All need the "
            f"same shapes, of tensors, arrays, numbers or text: pad or resize them ({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def require_outputs(outputs: Any, inputs: Tensor) -> None:
    """Raise StageError unless a model's outputs are one tensor with a row for each sample."""
    if isinstance(outputs, Tensor) and outputs.ndim and len(outputs) == len(inputs):
        return
    raise StageError(
        f"task.model: for {len(inputs)} samples, {describe(inputs)}, the model gives {describe(outputs)}; it must give "
        "one tensor with a row for each sample. Return that from its forward, for example `outputs.logits`, or with "
        "the batch as the first dimension"
    )


def require_loss(loss: Any, *, place: str = "task.loss") -> None:
    """Raise StageError unless a loss is one number with a gradient, or (sum, weight) of which the sum is that."""
    total = loss[0] if isinstance(loss, tuple) and len(loss) == 2 else loss
    if not isinstance(total, Tensor) or total.numel() != 1:
        raise StageError(f"{place}: the loss of a batch is {describe(loss)}; it must be a tensor with one number")
    if torch.is_grad_enabled() and not total.requires_grad:
        raise StageError(
            f"{place}: the loss of a batch has no gradient, so nothing can be learned: compute it from the model's "
            "outputs by torch alone, without detach(), item(), numpy or argmax, and leave some parameter to train"
        )
