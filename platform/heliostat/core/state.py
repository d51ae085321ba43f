"""A torch module's state dict on its way through copies and files, without importing torch.

Beside its tensors a state dict has `_metadata`, the version of each module's format, which some modules need to load
(torchvision's MNASNet), entries that are not tensors (`get_extra_state`), and names that share one tensor. All of that
has to arrive.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

Change = Callable[[Any], Any]


def map_state(state: Mapping[str, Any], change: Change) -> OrderedDict[str, Any]:
    """The state with `change` applied to each tensor, once for names that share it; other leaves as they are."""
    return with_metadata_of(state, map_tensors(state, change))


def map_tensors(tree: Any, change: Change) -> Any:
    """The same for mappings, lists and tuples in each other, such as a checkpoint with a state dict in it."""
    return _mapped(tree, change, {})


def _mapped(value: Any, change: Change, changed: dict[Any, Any]) -> Any:
    """Map one part. (A closure that calls itself would keep all of `changed` until the garbage collector runs.)"""
    if isinstance(value, Mapping):
        items = ((key, _mapped(item, change, changed)) for key, item in value.items())
        return with_metadata_of(value, OrderedDict(items)) if isinstance(value, OrderedDict) else dict(items)
    if type(value) in (list, tuple):
        return type(value)(_mapped(item, change, changed) for item in value)
    if not hasattr(value, "untyped_storage"):
        return value
    key = _memory_of(value) or id(value)
    if key not in changed:
        changed[key] = change(value)
    return changed[key]


def with_metadata_of(state: Mapping[str, Any], other: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """The other state as a state dict with the `_metadata` of the first, if that has any."""
    result = OrderedDict(other)
    if hasattr(state, "_metadata"):
        result._metadata = copy.deepcopy(state._metadata)  # type: ignore[attr-defined]  # where torch keeps it
    return result


def _memory_of(tensor: Any) -> tuple[Any, ...] | None:
    """Equal for plain tensors that are the same memory in the same form; None where that is not known."""
    if type(tensor).__name__ not in ("Tensor", "Parameter") or not str(tensor.layout).endswith("strided"):
        return None
    address = tensor.untyped_storage().data_ptr()
    place = (address, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.is_conj())
    return place if address else None
