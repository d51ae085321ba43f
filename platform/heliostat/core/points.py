"""From a point of a space back to what an engine would have drawn for it."""

import math
import random
from collections.abc import Mapping
from typing import Any

from heliostat.core.identity import canonical_json
from heliostat.core.space import (
    Choice,
    Constant,
    Dimension,
    Grid,
    LogRandInt,
    LogUniform,
    QUniform,
    RandInt,
    Space,
    Uniform,
    Varied,
)
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


def why_apart(one: Space, other: Space) -> str | None:
    """Why no point of one space can lie in the other as well; None where one may.

    Of a dimension that only some options open, nothing but its path is looked at.
    """
    for space, beside in ((one, other), (other, one)):
        if lone := next((path for path in space.dimensions if path not in beside.paths()), None):
            return f"{lone}: not in both spaces{nearest(lone, beside.paths())}"
    shared = [path for path in one.dimensions if path in other.dimensions]
    apart = next((path for path in shared if not _may_meet(one.dimensions[path], other.dimensions[path])), None)
    return f"{apart}: no value is in both spaces" if apart else None


def _may_meet(one: Dimension, other: Dimension) -> bool:
    for listed, beside in ((one, other), (other, one)):
        if isinstance(listed, Choice | Grid | Constant):
            values = [listed.value] if isinstance(listed, Constant) else [option.value for option in listed.options]
            return any(_number(beside, value) is not None for value in values)
    (low, high), (lowest, highest) = _ends(one), _ends(other)
    return max(low, lowest) <= min(high, highest)


def _ends(dimension: Dimension) -> tuple[float, float]:
    match dimension:
        case Uniform(low, high) | LogUniform(low, high) | QUniform(low, high):
            return low, high
        case RandInt(low, end) | LogRandInt(low, end):
            return low, end - 1
    return -math.inf, math.inf


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
