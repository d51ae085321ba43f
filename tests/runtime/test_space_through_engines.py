"""The search-space grammar by property: whatever a space says, every engine gives it back."""

import json
import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heliostat.core.objective import Costs
from heliostat.core.space import Constant, LogRandInt, LogUniform, Normal, QUniform, RandInt, Space, Uniform
from heliostat.errors import SpecError
from heliostat.runtime.engines import engines

SCALARS = st.one_of(st.integers(-5, 5), st.sampled_from(["adam", "sgd"]), st.booleans(), st.none(), st.just(0.5))
VALUES = st.one_of(
    SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(st.sampled_from(["kernel", "stride", ""]), SCALARS)
)


@st.composite
def ranges(draw: Any, low: float, high: float) -> list[float]:
    ends = st.floats(low, high, allow_nan=False, allow_subnormal=False)
    return sorted(draw(st.lists(ends, min_size=2, max_size=2, unique=True)))


@st.composite
def documents(draw: Any, prefix: str = "p", depth: int = 2, continuous: bool = True) -> dict[str, Any]:
    """Spaces as they stand in a file, conditional ones included, each path once."""
    found: dict[str, Any] = {}
    for index in range(draw(st.integers(1, 3))):
        path = f"{prefix}{index}"
        words = ["randint", "lograndint", "quniform", "choice", "grid", "constant"]
        match draw(st.sampled_from([*words, *(["uniform", "loguniform", "normal"] if continuous else [])])):
            case "uniform":
                found[path] = {"uniform": draw(ranges(-1e6, 1e6))}
            case "loguniform":
                found[path] = {"loguniform": draw(ranges(1e-9, 1e9))}
            case "normal":
                found[path] = {"normal": [draw(st.integers(-9, 9)), draw(st.floats(1e-3, 1e3))]}
            case "randint":
                low = draw(st.integers(-50, 50))
                found[path] = {"randint": [low, low + draw(st.integers(1, 4))]}
            case "lograndint":
                low = draw(st.integers(1, 50))
                found[path] = {"lograndint": [low, low + draw(st.integers(1, 4))]}
            case "quniform":
                low, step = draw(st.integers(-9, 9)) / 10, draw(st.sampled_from([0.1, 0.25, 1]))
                found[path] = {"quniform": [low, low + step * draw(st.integers(2, 4)), step]}
            case "constant":
                found[path] = draw(SCALARS)
            case word:
                options: list[Any] = draw(st.lists(VALUES, min_size=1, max_size=3))
                if depth and draw(st.booleans()):
                    inner = draw(documents(prefix=f"{path}.q", depth=depth - 1, continuous=continuous))
                    options.append({"value": "opens", "space": inner})
                found[path] = {word: options}
    return found


def same(one: Any, other: Any) -> bool:
    """As it would be written: `true` is not 1."""
    return json.dumps(one) == json.dumps(other)


def opened(space: Space, point: dict[str, Any]) -> set[str]:
    """The paths that exist at a point, each of whose values was looked at: it lies in its dimension, as written."""
    paths = set(space.dimensions)
    for path, dimension in space.dimensions.items():
        value = point[path]
        match dimension:
            case Uniform(low, high) | LogUniform(low, high):
                assert type(value) is float
                assert low <= value <= high
            case Normal(mean, deviation):
                assert type(value) is float
                assert math.isfinite(value)
                assert abs(value - mean) < 9 * deviation
            case RandInt() | LogRandInt() | QUniform():
                assert any(same(value, known) for known in dimension.values)
            case Constant(constant):
                assert same(value, constant)
            case _:
                taken = [option for option in dimension.options if same(option.value, value)]
                assert taken
                paths |= opened(taken[0].space, point)
    return paths


@pytest.mark.parametrize("algorithm", [name for name, kind in engines().items() if not kind.exhaustive])
@settings(max_examples=25, deadline=None)
@given(document=documents(), seed=st.integers(0, 2**31))
def test_parameters_lie_within_their_space_and_come_again_from_the_same_past(algorithm, document, seed):
    space = Space.parse(document)
    one, other = (engines()[algorithm].make(space, num_objectives=1, seed=seed, trials=8) for _ in range(2))
    for trial in map(str, range(8)):
        point = one.suggest(trial)
        assert set(point) == opened(space, point)
        assert same(point, other.suggest(trial))
        outcome = None if trial == "2" else Costs((float(len(json.dumps(point))),))
        one.observe(trial, outcome)
        other.observe(trial, outcome)


@settings(max_examples=60, deadline=None)
@given(documents(depth=1, continuous=False), st.integers(0, 2**32))
def test_a_grid_has_as_many_points_as_the_size_says_and_every_sample_is_one_of_them(document, seed):
    space = Space.parse(document)
    points = space.grid()
    assert len(points) == space.size()
    assert space.sample(random.Random(seed)) in points


@settings(max_examples=60, deadline=None)
@given(documents())
def test_a_space_has_a_size_exactly_when_it_has_a_grid(document):
    space = Space.parse(document)
    if space.size() is None:
        with pytest.raises(SpecError):
            space.grid()
    elif space.size() < 10_000:
        assert len(space.grid()) == space.size()
