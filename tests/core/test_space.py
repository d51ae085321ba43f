"""The search-space grammar, by example and by property."""

import random
from typing import Any

import pytest

from heliostat.core.points import numbers_at, why_apart
from heliostat.core.probes import probes
from heliostat.core.space import (
    Choice,
    Constant,
    Grid,
    LogRandInt,
    LogUniform,
    Normal,
    Option,
    QUniform,
    RandInt,
    Space,
    Uniform,
)
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
        g={"quniform": [0.1, 0.45, 0.1]},
        h={"lograndint": [1, 1000]},
        i={"normal": [0, 2]},
    )
    assert space.dimensions == {
        "a": Uniform(0.0, 1.0),
        "b": LogUniform(1e-4, 1e-1),
        "c": RandInt(2, 5),
        "d": Choice(tuple(Option(value, NOTHING) for value in ("x", None, [1, 2], {"any": "thing"}))),
        "e": Grid((Option(1, NOTHING), Option(2, NOTHING))),
        "f": Constant(True),
        "g": QUniform(0.1, 0.45, 0.1),
        "h": LogRandInt(1, 1000),
        "i": Normal(0.0, 2.0),
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


def test_the_steps_of_a_range_are_as_one_would_write_them():
    assert [point["a"] for point in parse(a={"quniform": [0.1, 0.75, 0.2]}).grid()] == [0.1, 0.3, 0.5, 0.7]
    assert [point["a"] for point in parse(a={"quniform": [0, 1, 0.1]}).grid()] == [k / 10 for k in range(11)]
    assert parse(a={"quniform": [0, 1, 1e-15]}).size() == 10**15 + 1  # and none of them is made before it is drawn


@pytest.mark.parametrize("written", [[16, 64, 16], [16.0, 64.0, 16.0], [16, 70, 16.0]])
def test_whole_steps_from_a_whole_number_give_whole_numbers(written):
    space = parse(a={"quniform": written})
    drawn = [space.sample(random.Random(seed))["a"] for seed in range(20)]
    ends = [point["a"] for point in probes(space, random.Random(0))]
    for values in (drawn, ends, [point["a"] for point in space.grid()]):
        assert all(type(value) is int and value in (16, 32, 48, 64) for value in values)
    assert [number for _, number in numbers_at(space, {"a": 32}).values()] == [1]
    assert [number for _, number in numbers_at(space, {"a": 32.0}).values()] == [1]  # a journal of before


@pytest.mark.parametrize("written", [[0.5, 4, 1], [1, 4, 0.5]])
def test_steps_that_are_not_whole_give_real_numbers_alone(written):
    assert all(type(point["a"]) is float for point in parse(a={"quniform": written}).grid())


def test_the_ends_of_every_dimension_are_tried_on_a_config():
    tried = [point["a"] for point in probes(parse(a={"quniform": [0, 1, 0.25]}), random.Random(0))]
    assert tried[:2] == [0.0, 1.0]
    assert [point["a"] for point in probes(parse(a={"randint": [2, 5]}), random.Random(0))][:2] == [2, 4]


@pytest.mark.parametrize(
    ("one", "other", "why"),
    [
        ({"uniform": [0, 1]}, {"loguniform": [0.9, 3]}, None),
        ({"uniform": [0, 1]}, {"randint": [2, 9]}, "a: no value is in both spaces"),
        ({"quniform": [0, 1, 0.5]}, {"choice": [0.25, 0.5]}, None),
        ({"quniform": [0, 1, 0.5]}, {"choice": [0.25, 0.75]}, "a: no value is in both spaces"),
        ({"choice": ["adam", "sgd"]}, "adam", None),
        ({"normal": [0, 1]}, 7.0, None),
        ({"choice": [{"value": 1, "space": {"b": 2}}, 3]}, {"randint": [1, 2]}, None),
    ],
)
def test_spaces_are_apart_where_no_point_can_lie_in_both(one, other, why):
    assert why_apart(parse(a=one), parse(a=other)) == why_apart(parse(a=other), parse(a=one)) == why


def test_spaces_with_other_parameters_are_apart_unless_an_option_opens_them():
    opened = parse(a={"choice": [{"value": 1, "space": {"b": {"uniform": [0, 1]}}}]})
    assert why_apart(opened, parse(a=1, b=0.5)) is None
    assert why_apart(parse(a=1), parse(a=1, bb=2)) == "bb: not in both spaces; known: a"


def test_whole_numbers_on_a_logarithmic_scale_have_each_magnitude_as_often():
    space, rng = parse(a={"lograndint": [1, 10_000]}), random.Random(0)
    drawn = [space.sample(rng)["a"] for _ in range(4000)]
    for low in (1, 10, 100, 1000):
        assert 900 < sum(low <= value < 10 * low for value in drawn) < 1100


@pytest.mark.parametrize("word", ["uniform", "loguniform", "normal"])
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
        ({"lograndint": [0, 9]}, r"space\.a\.lograndint: the logarithm needs a low end above zero, not 0"),
        ({"quniform": [0, 1]}, r"\[0, 1\] is not a stepped range; write \[low, high, step\]"),
        ({"quniform": [0, 1, 2]}, "a step of 2 does not lead from 0 to 1"),
        ({"quniform": [0, 1, 0]}, "a step of 0 does not lead from 0 to 1"),
        ({"normal": [0]}, r"\[0\] is not a normal distribution; write \[mean, deviation\]"),
        ({"normal": [0, -1]}, "the standard deviation is above zero, not -1"),
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


EVERYTHING = parse(
    a={"uniform": [0, 1]},
    b={"loguniform": [1e-4, 1e-1]},
    c={"randint": [2, 5]},
    d={"choice": ["x", None, [1, 2], {"any": "thing"}, True, 1]},
    e={"quniform": [0.1, 0.75, 0.2]},
    f={"lograndint": [1, 1000]},
    g={"normal": [0, 2]},
    h={"choice": ["plain", {"value": "opens", "space": {"i": {"grid": [1, 2]}}}]},
    j=7,
)


@pytest.mark.parametrize("seed", range(20))
def test_a_point_tells_the_numbers_that_it_was_made_of(seed):
    point = EVERYTHING.sample(random.Random(seed))
    numbers = numbers_at(EVERYTHING, point)
    assert EVERYTHING.point(lambda label, dimension: numbers[label][1]) == point


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": 1.5}, "a: 1.5 is not in the space"),
        ({"c": 5}, "c: 5 is not in the space"),
        ({"c": True}, "c: True is not in the space"),
        ({"d": "y"}, "d: 'y' is not in the space"),
        ({"e": 0.4}, "e: 0.4 is not in the space"),
        ({"j": 8}, "j: 8 is not in the space"),
        ({"h": "plain", "i": 1}, "i: not in the space at this point"),
        ({"aa": 1}, "aa: not in the space; did you mean 'a'"),
    ],
)
def test_a_point_of_another_space_is_refused_by_its_first_difference(changes, message):
    point = EVERYTHING.sample(random.Random(1)) | {"h": "opens", "i": 2} | changes
    with pytest.raises(SpecError, match=message):
        numbers_at(EVERYTHING, point)
