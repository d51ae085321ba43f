import random

import pytest

from heliostat.core.points import point_near
from heliostat.core.space import Space
from heliostat.stages.first_point import known_values
from heliostat.training.config import TrainConfig


def build_model(depth, width=32, **more): ...


FUNCTIONS = {"model": build_model, "data": lambda scale=1.0: None}


def values(space, **train):
    return known_values(Space.parse(space), TrainConfig.model_validate(train), FUNCTIONS)


@pytest.mark.parametrize(
    ("path", "train", "value"),
    [
        ("optimizer.lr", {"optimizer": {"lr": 0.02}}, 0.02),
        ("optimizer.lr", {}, 0.001),
        ("optimizer.weight_decay", {"optimizer": {"name": "adamw"}}, 0.01),  # torch's own default
        ("batch_size", {"batch_size": 64}, 64),
        ("model_args.width", {}, 32),  # the function's own default
        ("model_args.width", {"model_args": {"width": 8}}, 8),
        ("data_args.scale", {}, 1.0),
    ],
)
def test_what_is_searched_has_a_value_without_a_search(path, train, value):
    assert values({path: {"choice": [0]}}, **train) == {path: value}


@pytest.mark.parametrize("path", ["model_args.depth", "model_args.other", "optimizer.momentum"])
def test_what_nobody_gives_a_value_is_left_out(path):
    assert values({path: {"choice": [0]}}) == {}


def test_the_point_has_the_known_values_that_lie_in_the_space_and_draws_the_others():
    space = Space.parse(
        {
            "optimizer.lr": {"loguniform": [1e-4, 1e-1]},
            "batch_size": {"choice": [16, {"value": 64, "space": {"clip_norm": {"uniform": [0.5, 2.0]}}}]},
            "model_args.width": {"choice": [8, 16]},
            "model_args.dropout": {"quniform": [0.0, 0.5, 0.1]},
        }
    )
    known = {
        "optimizer.lr": 0.02,
        "batch_size": 64,
        "clip_norm": 1.0,
        "model_args.width": 32,
        "model_args.dropout": 0.3,
    }
    point = point_near(space, known, random.Random(0))
    drawn = point.pop("model_args.width")
    assert point == {k: v for k, v in known.items() if k != "model_args.width"}
    assert drawn in (8, 16)


def test_there_is_no_such_point_where_nothing_is_known():
    assert point_near(Space.parse({"model_args.width": {"choice": [8, 16]}}), {}, random.Random(0)) is None
