"""The state dict of a model that was trained, on its way into one that is built anew."""

import io
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from heliostat.core.state import with_metadata_of
from heliostat.errors import SpecError, StageError

WRAPPERS = frozenset({"module", "_orig_mod"})
"""How DDP, DataParallel and torch.compile call the module that they wrap."""


def load_weights(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load the state, whether or not it, or the model, is of a wrapper around the other.

    Raises StageError for a state that is not this model's.
    """
    plain = {_unwrapped(name): name for name in model.state_dict()}
    given = {_unwrapped(name): name for name in state}
    if set(state) != set(plain.values()) and plain.keys() == given.keys():
        renamed = with_metadata_of(state, {plain[name]: state[given[name]] for name in given})
        if hasattr(renamed, "_metadata"):
            renamed._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
        state = renamed
    try:
        model.load_state_dict(state)
    except RuntimeError as error:  # the names or the shapes
        raise StageError(f"the trained weights do not fit the model that task.model builds: {error}") from error


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def require_plain_state(model: nn.Module) -> None:
    """Raises SpecError for state that a saved model could not be read back with: only plain values are unpickled."""
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            continue
        file = io.BytesIO()
        torch.save(value, file)
        file.seek(0)
        try:
            torch.load(file, weights_only=True)
        except pickle.UnpicklingError as error:
            raise SpecError(
                f"task.model: the state {name!r} is a {type(value).__name__} that torch.load (weights_only) refuses; "
                "let get_extra_state return tensors, numbers, text, and lists and dicts of these"
            ) from error
