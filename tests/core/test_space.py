"""The search-space grammar, by example and by property."""

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heliostat.core.space import Choice, Constant, Grid, LogUniform, Option, RandInt, Space, Uniform
from heliostat.errors import SpecError

NOTHING = Space({})


def parse(**dimensions: Any) -> Space:
    return Space.parse(dimensions)


def test_every_word_of_the_grammar_has_its_dimension():
    space = parse(
        a={"uniform": [0, 1]},
        b={"loguniform": [1e-4, 1e-1]},
        c={"randint": [2, 5]},
        d={"choice": ["x", None, [1, 2], {"any": "thing"}]},
        e={"grid": [1, 2]},
        f=True,
    )
    assert space.dimensions == {
        "a": Uniform(0.0, 1.0),
        "b": LogUniform(1e-4, 1e-1),
        "c": RandInt(2, 5),
        "d": Choice(tuple(Option(value, NOTHING) for value in ("x", None, [1, 2], {"any": "thing"}))),
        "e": Grid((Option(1, NOTHING), Option(2, NOTHING))),
        "f": Constant(True),
    }


CONDITIONAL = parse(
    name={
        "choice": [
            "adam",
            {"value": "sgd", "space": {"momentum": {"uniform": [0, 1]}, "nesterov": {"choice": [True, False]}}},
        ]
    },
    seed=7,
)


def test_what_an_option_opens_is_there_exactly_when_it_is_taken():
    rng = random.Random(0)
    points = [CONDITIONAL.sample(rng) for _ in range(50)]
    assert {point["name"] for point in points} == {"adam", "sgd"}
    for point in points:
        assert set(point) == {"name", "seed"} | ({"momentum", "nesterov"} if point["name"] == "sgd" else set())
    assert CONDITIONAL.paths() == ["name", "seed", "momentum", "nesterov"]


def test_a_grid_has_the_last_dimension_vary_fastest():
    space = parse(a={"grid": [1, 2]}, b=0, c={"randint": [5, 7]})
    assert [tuple(point.values()) for point in space.grid()] == [(1, 0, 5), (1, 0, 6), (2, 0, 5), (2, 0, 6)]
    assert space.size() == 4


def test_a_grid_unfolds_what_an_option_opens():
    space = parse(a={"choice": ["x", {"value": "y", "space": {"b": {"grid": [1, 2]}}}]}, c={"choice": [0]})
    assert space.grid() == [{"a": "x", "c": 0}, {"a": "y", "b": 1, "c": 0}, {"a": "y", "b": 2, "c": 0}]
    assert space.size() == 3


@pytest.mark.parametrize("word", ["uniform", "loguniform"])
def test_a_continuous_dimension_has_no_grid_however_deep(word):
    for space in (
        parse(a={word: [0.1, 1]}),
        parse(b={"choice": [1, {"value": 2, "space": {"a": {word: [0.1, 1]}}}]}),
    ):
        assert space.size() is None
        with pytest.raises(SpecError, match=f"a: {word} has no end of values"):
            space.grid()


@pytest.mark.parametrize(
    ("dimension", "message"),
    [
        ({"uniform": [1, 0]}, r"space\.a\.uniform: the range \[1, 0\] is reversed"),
        ({"randint": [1, 1]}, r"space\.a\.randint: the range \[1, 1\] is empty"),
        ({"uniform": 3}, r"space\.a\.uniform: 3 is not a range; write \[low, high\]"),
        ({"uniform": [0, float("inf")]}, "inf is not a number"),
        ({"uniform": [False, True]}, "False is not a number"),
        ({"randint": [0, 1.0]}, r"1\.0 is not a whole number"),
        ({"loguniform": [-1, 1]}, "the logarithm needs a low end above zero, not -1"),
        ({"choice": "adam"}, "'adam' offers nothing to choose from"),
        ({"choise": [1]}, "unknown dimension 'choise'; did you mean 'choice'"),
        ({}, "one dimension has one word, not 0: nothing"),
        ([1, 2], r"\[1, 2\] is a list; write \{choice: \[1, 2\]\}"),
        (
            {"choice": [0, {"value": 1, "space": {"b": {"uniform": [1, 0]}}}]},
            r"space\.a\.choice\[1\]\.space\.b\.uniform: the range \[1, 0\] is reversed",
        ),
    ],
)
def test_a_faulty_dimension_is_refused_by_its_place(dimension, message):
    with pytest.raises(SpecError, match=message):
        parse(a=dimension)


def test_a_mapping_that_is_not_an_option_with_a_space_is_a_plain_value():
    space = parse(a={"choice": [{"value": 1}, {"kernel": 3, "stride": 2}]})
    assert [point["a"] for point in space.grid()] == [{"value": 1}, {"kernel": 3, "stride": 2}]


# --- properties ------------------------------------------------------------------------------------

VALUES = st.one_of(st.integers(-5, 5), st.sampled_from(["adam", "sgd"]), st.booleans(), st.none())


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
        words = ["randint", "choice", "grid", "constant", *(["uniform", "loguniform"] if continuous else [])]
        match draw(st.sampled_from(words)):
            case "uniform":
                found[path] = {"uniform": draw(ranges(-1e6, 1e6))}
            case "loguniform":
                found[path] = {"loguniform": draw(ranges(1e-9, 1e9))}
            case "randint":
                low = draw(st.integers(-50, 50))
                found[path] = {"randint": [low, low + draw(st.integers(1, 4))]}
            case "constant":
                found[path] = draw(VALUES)
            case word:
                options: list[Any] = draw(st.lists(VALUES, min_size=1, max_size=3))
                if depth and draw(st.booleans()):
                    inner = draw(documents(prefix=f"{path}.q", depth=depth - 1, continuous=continuous))
                    options.append({"value": "opens", "space": inner})
                found[path] = {word: options}
    return found


def inside(dimension: Any, value: Any) -> bool:
    match dimension:
        case Uniform(low, high) | LogUniform(low, high):
            return isinstance(value, float) and low <= value <= high
        case RandInt(low, high):
            return value in range(low, high)
        case Constant(constant):
            return value == constant
        case _:
            return value in [option.value for option in dimension.options]


@settings(max_examples=60, deadline=None)
@given(documents(), st.integers(0, 2**32))
def test_a_sample_lies_within_its_space_and_comes_again_from_the_same_seed(document, seed):
    space = Space.parse(document)
    point = space.sample(random.Random(seed))
    assert point == space.sample(random.Random(seed))
    assert set(document) <= set(point) <= set(space.paths())
    for path, dimension in space.dimensions.items():
        assert inside(dimension, point[path])


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
