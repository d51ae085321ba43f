"""The first point of a search that learns: what the pipeline would train with if it searched for nothing.

What people write down as a default is seldom bad, and a search that has tried it ends no worse than no search. SMAC
starts so too (Lindauer et al. 2022, https://jmlr.org/papers/v23/21-0888.html).
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from typing import Any

from heliostat.core.space import Space
from heliostat.training.config import TrainConfig


def known_values(space: Space, config: TrainConfig, functions: Mapping[str, Callable[..., Any]]) -> dict[str, Any]:
    """By path, what is searched has without a search: by the config, else by a default of what the config calls.

    `functions` are the task's, by `model` and `data`. What nobody says a value for is left out.
    """
    return {path: value for path in space.paths() if (value := _value(path, config, functions)) is not None}


def _value(path: str, config: TrainConfig, functions: Mapping[str, Callable[..., Any]]) -> Any:
    stated = _walk(config.model_dump(mode="json"), path.split("."))
    if stated is not None:
        return stated
    field, _, argument = path.partition(".")
    if field == "optimizer":
        return _default(_optimizer(config), argument)
    return _default(functions.get(field.removesuffix("_args")), argument) if field.endswith("_args") else None


def _walk(mapping: Any, steps: Iterable[str]) -> Any:
    return reduce(lambda inner, step: inner.get(step) if isinstance(inner, Mapping) else None, steps, mapping)


def _optimizer(config: TrainConfig) -> Callable[..., Any]:
    from heliostat.core.imports import resolve
    from heliostat.training.optim import OPTIMIZERS

    optimizer: Callable[..., Any] = OPTIMIZERS.get(config.optimizer.name) or resolve(config.optimizer.name)
    return optimizer


def _default(function: Callable[..., Any] | None, argument: str) -> Any:
    """What the argument of a function is when nobody states it; None when somebody has to."""
    try:
        parameters = inspect.signature(function).parameters if function else {}
    except (TypeError, ValueError):  # a builtin written in C has no signature
        return None
    found = parameters.get(argument)
    return None if found is None or found.default is inspect.Parameter.empty else found.default
