"""Dotted paths into a config, such as `optimizer.lr` or `model_args.width`."""

from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel

from heliostat.core.validate import validate
from heliostat.errors import nearest

T = TypeVar("T", bound=BaseModel)


def why_not_a_path(model: type[BaseModel], path: str) -> str | None:
    """Why `path` names no field of `model`, or None when it does."""
    current: Any = model
    steps = path.split(".")
    for depth, step in enumerate(steps):
        if isinstance(current, type) and issubclass(current, BaseModel):
            field = current.model_fields.get(step)
            if field is None:
                return f"unknown field {step!r}{nearest(step, current.model_fields)}"
            current = _inner(field.annotation)
        elif get_origin(current) is dict:
            return None if all(steps[depth:]) else "a path has no empty step"
        else:
            return f"{'.'.join(steps[:depth])} has no fields of its own"
    if get_origin(current) is dict:
        return f"name what is to vary inside it, such as {path}.width"
    return None


def _inner(annotation: Any) -> Any:
    """The annotation without `| None`."""
    options = [a for a in get_args(annotation) if a is not type(None)]
    return options[0] if get_origin(annotation) is not dict and len(options) == 1 else annotation


def set_path(mapping: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of a nested mapping with one value set; mappings on the way are made where missing."""
    head, _, rest = path.partition(".")
    below = mapping.get(head)
    return {**mapping, head: set_path(below if isinstance(below, Mapping) else {}, rest, value) if rest else value}


def without(mapping: Mapping[str, Any], path: str) -> dict[str, Any]:
    """A copy of a nested mapping without the value at `path`, if there is one."""
    head, _, rest = path.partition(".")
    below = mapping.get(head)
    if not rest:
        return {name: value for name, value in mapping.items() if name != head}
    return {**mapping, head: without(below, rest)} if isinstance(below, Mapping) else dict(mapping)


def overlay(config: T, params: Mapping[str, Any], *, place: str = "") -> T:
    """`config` with the values of `params` (path -> value) put over it, checked again. Raises SpecError."""
    mapping: dict[str, Any] = config.model_dump(exclude_unset=True)
    for path, value in params.items():
        mapping = set_path(mapping, path, value)
    return validate(type(config), mapping, place)
