"""From a point of a space back to what an engine would have drawn for it."""

import random
from collections.abc import Mapping
from typing import Any

from heliostat.core.identity import canonical_json
from heliostat.core.space import Choice, Constant, Dimension, Grid, QUniform, Space, Varied
from heliostat.errors import SpecError, nearest


def numbers_at(space: Space, point: Mapping[str, Any]) -> dict[str, tuple[Varied, Any]]:
    """By label, each dimension that exists at a point and the number that `draw` would have said: `point` undone.

    Raises SpecError for a path that is missing or too many, and for a value outside its dimension.
    """
    if strange := next((path for path in point if path not in space.paths()), None):
        raise SpecError(f"{strange}: not in the space{nearest(strange, space.paths())}")
    found = dict(_numbers(space, point, ""))
    there = space.point(lambda label, _: found[label][1])
    if unknown := next((path for path in point if path not in there), None):
        raise SpecError(f"{unknown}: not in the space at this point, only at others")
    return found


def point_near(space: Space, values: Mapping[str, Any], rng: random.Random) -> dict[str, Any] | None:
    """The point with those of the values (path -> value) that lie in the space, the others drawn; None without any."""
    met = False

    def number(label: str, dimension: Varied) -> Any:
        nonlocal met
        path = label.rpartition("/")[2]
        known = _number(dimension, values[path]) if path in values else None
        met = met or known is not None
        return dimension.sample(rng) if known is None else known

    point = space.point(number)
    return point if met else None


def _numbers(space: Space, point: Mapping[str, Any], prefix: str) -> dict[str, tuple[Varied, Any]]:
    found: dict[str, tuple[Varied, Any]] = {}
    for path, dimension in space.dimensions.items():
        label = f"{prefix}{path}"
        if path not in point:
            raise SpecError(f"{path}: missing")
        number = _number(dimension, point[path])
        if number is None:
            raise SpecError(f"{path}: {point[path]!r} is not in the space")
        if not isinstance(dimension, Constant):
            found[label] = (dimension, number)
        if isinstance(dimension, Choice | Grid):
            found |= _numbers(dimension.options[number].space, point, f"{label}/{number}/")
    return found


def _number(dimension: Dimension, value: Any) -> Any:
    """What `sample` would have drawn for a value; None for one outside."""
    match dimension:
        case Constant(constant):
            return 0 if canonical_json(constant) == canonical_json(value) else None
        case Choice(options) | Grid(options):
            written = canonical_json(value)
            return next((i for i, option in enumerate(options) if canonical_json(option.value) == written), None)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    number = round((value - dimension.low) / dimension.step) if isinstance(dimension, QUniform) else value
    return number if dimension.within(number) == value else None
