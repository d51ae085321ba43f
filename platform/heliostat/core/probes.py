"""Points of a space that show whether a config takes all that the space offers."""

import random
from collections.abc import Iterator, Mapping
from typing import Any

from heliostat.core.space import (
    Choice,
    Constant,
    Dimension,
    Grid,
    LogRandInt,
    LogUniform,
    Normal,
    QUniform,
    RandInt,
    Space,
    Uniform,
)

RARE = 4.0
"""A config must take what a normal distribution gives within so many deviations: all but one in 16,000."""


def probes(space: Space, rng: random.Random) -> Iterator[Mapping[str, Any]]:
    """Every end of every dimension, the others drawn at random, then some points at random."""
    for path, dimension in space.dimensions.items():
        others = Space({other: d for other, d in space.dimensions.items() if other != path})
        yield from ({**others.sample(rng), **end} for end in _ends(path, dimension, rng))
    yield from (space.sample(rng) for _ in range(8))


def _ends(path: str, dimension: Dimension, rng: random.Random) -> Iterator[Mapping[str, Any]]:
    match dimension:
        case Uniform(low, high) | LogUniform(low, high):
            yield from ({path: low}, {path: high})
        case RandInt() | LogRandInt() | QUniform():
            yield from ({path: dimension.values[0]}, {path: dimension.values[-1]})
        case Normal(mean, deviation):
            yield from ({path: mean - RARE * deviation}, {path: mean + RARE * deviation})
        case Choice(options) | Grid(options):
            yield from ({path: option.value, **point} for option in options for point in probes(option.space, rng))
        case Constant(value):
            yield {path: value}
