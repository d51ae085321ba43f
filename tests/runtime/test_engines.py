import json
import os
import subprocess
import sys

import pytest

from heliostat.core.objective import Costs
from heliostat.core.space import Space
from heliostat.runtime.engines import engines

SPACE = Space.parse(
    {
        "optimizer.lr": {"loguniform": [1e-4, 1e-1]},
        "scheduler.warmup_epochs": {"uniform": [0.0, 2.0]},
        "model_args.width": {"randint": [4, 9]},
        "model_args.only": {"randint": [3, 4]},
        "model_args.layers": {"choice": [[8, 8], {"wide": [1]}, None, {}]},
        "optimizer.name": {
            "choice": ["adam", {"value": "sgd", "space": {"optimizer.momentum": {"uniform": [0.0, 0.9]}}}]
        },
        "model_args.bias": True,
    }
)


SAMPLING = [name for name, kind in engines().items() if not kind.exhaustive]
LEARNING = ["bayesian", "optuna_tpe"]
OBJECTIVES = [(name, number) for name in SAMPLING for number in ([1, 2] if engines()[name].several else [1])]


def make_engine(algorithm: str, **settings):
    return engines()[algorithm].make(settings.pop("space"), **{"num_objectives": 1} | settings)


def costs(params: dict, number: int = 1) -> Costs:
    lr, width = params["optimizer.lr"], params["model_args.width"]
    return Costs((lr * width, -lr)[:number], excess=(width / 6 - 1,))


@pytest.mark.parametrize("algorithm", SAMPLING)
def test_parameters_lie_in_the_space_and_options_come_back_as_written(algorithm):
    engine = make_engine(algorithm, space=SPACE, seed=1, trials=30)
    seen = []
    for trial in map(str, range(40)):
        params = engine.suggest(trial)
        engine.observe(trial, costs(params))
        assert 1e-4 <= params["optimizer.lr"] <= 1e-1
        assert params["model_args.width"] in range(4, 9)
        assert type(params["model_args.width"]) is int
        assert params["model_args.only"] == 3
        assert params["model_args.bias"] is True
        assert ("optimizer.momentum" in params) == (params["optimizer.name"] == "sgd")
        json.dumps(params)
        seen.append(params["model_args.layers"])
    assert all(option in seen for option in ([8, 8], {"wide": [1]}, None, {}))


def past_of(algorithm: str, number: int, trials: int) -> list[tuple]:
    """What a search with two trials at a time suggested and what came of it, in order. One of its trials fails."""
    engine = make_engine(algorithm, space=SPACE, num_objectives=number, seed=3, trials=trials)
    past, open_trials = [], []
    for index in range(trials):
        trial = str(index)
        open_trials.append((trial, engine.suggest(trial)))
        past.append(("suggested", *open_trials[-1]))
        if index % 2:
            for ended, params in reversed(open_trials):
                outcome = None if ended == "5" else costs(params, number)
                engine.observe(ended, outcome)
                past.append(("ended", ended, outcome))
            open_trials = []
    return past


@pytest.mark.parametrize(("algorithm", "number"), OBJECTIVES)
def test_a_fresh_engine_led_through_the_past_suggests_what_the_first_would_have(algorithm, number):
    again = make_engine(algorithm, space=SPACE, num_objectives=number, seed=3, trials=24)
    for event, trial, what in past_of(algorithm, number, 24):
        if event == "suggested":
            assert again.suggest(trial) == what
        else:
            again.observe(trial, what)


@pytest.mark.parametrize("algorithm", SAMPLING)
def test_an_engine_goes_on_from_points_that_it_did_not_suggest(algorithm):
    space = Space.parse({"x": {"normal": [0, 3]}, "y": {"randint": [0, 9]}, "z": {"choice": [[1], {"a": 2}]}})
    near, points = make_engine(algorithm, space=space, seed=0, trials=30), []
    for index in range(30):
        point = {"x": (index - 15) / 5, "y": index % 9, "z": [[1], {"a": 2}][index % 2]}
        near.adopt(str(index), point)
        near.observe(str(index), Costs(((point["x"] - 1) ** 2 + (point["y"] - 4) ** 2,)))
    for index in range(30, 50):
        points.append(near.suggest(str(index)))
        near.observe(str(index), None)
    if algorithm in LEARNING:
        assert sum(abs(point["y"] - 4) <= 1 for point in points) >= 15  # where those that it was given were good


@pytest.mark.parametrize("algorithm", SAMPLING)
def test_an_engine_goes_on_from_a_point_that_it_would_never_have_drawn(algorithm):
    engine = make_engine(algorithm, space=Space.parse({"x": {"normal": [0, 1]}}), seed=0, trials=4)
    for trial, x in {"low": -99.0, "high": 99.0}.items():
        engine.adopt(trial, {"x": x})
        engine.observe(trial, Costs((x,)))
    for trial in map(str, range(8)):
        assert isinstance(engine.suggest(trial)["x"], float)
        engine.observe(trial, Costs((0.0,)))


def test_another_process_suggests_the_same():
    """A search goes on in a process whose hashes of strings are others."""
    script = f"""
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("here", {__file__!r})
here = importlib.util.module_from_spec(spec)
spec.loader.exec_module(here)
print([here.past_of(*case, 24) for case in here.OBJECTIVES])
"""
    here = repr([past_of(*case, 24) for case in OBJECTIVES])
    environment = os.environ | {"PYTHONHASHSEED": "1234"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == here


@pytest.mark.parametrize("algorithm", LEARNING)
def test_a_search_with_a_model_learns_where_to_look(algorithm):
    space = Space.parse({"x": {"uniform": [-5.0, 5.0]}, "y": {"uniform": [-5.0, 5.0]}})

    def late(algorithm: str, seed: int) -> float:
        engine, found = make_engine(algorithm, space=space, seed=seed, trials=40), []
        for trial in map(str, range(40)):
            point = engine.suggest(trial)
            found.append((point["x"] - 1) ** 2 + (point["y"] + 2) ** 2)
            engine.observe(trial, Costs((found[-1],)))
        return sum(found[20:]) / 20

    assert all(late(algorithm, seed) < 0.8 * late("random", seed) for seed in range(3))


@pytest.mark.parametrize("algorithm", LEARNING)
def test_a_search_with_a_model_learns_to_keep_to_a_limit(algorithm):
    space = Space.parse({"x": {"uniform": [0.0, 10.0]}})

    def within(algorithm: str, seed: int) -> int:
        engine, found = make_engine(algorithm, space=space, seed=seed, trials=40), []
        for trial in map(str, range(40)):
            x = engine.suggest(trial)["x"]
            found.append(x <= 3)
            engine.observe(trial, Costs((-x,), excess=(x / 3 - 1,)))  # but for the limit, the more the better
        return sum(found[20:])

    found = {name: sum(within(name, seed) for seed in range(4)) for name in (algorithm, "random")}
    assert found[algorithm] > 1.25 * found["random"]


def test_grid_search_tries_every_point_once_and_ends():
    space = Space.parse({"a": {"grid": [1, 2]}, "b": {"choice": ["x", "y", "z"]}})
    engine = make_engine("grid", space=space, seed=0, trials=99)
    points = [engine.suggest(str(i)) for i in range(7)]
    assert points[:6] == [{"a": a, "b": b} for a in (1, 2) for b in "xyz"]
    assert points[6] is None


def test_grid_search_does_not_come_back_to_a_point_that_was_adopted():
    engine = make_engine("grid", space=Space.parse({"a": {"grid": [1, True]}}), seed=0, trials=2)
    engine.adopt("0", {"a": True})
    assert [engine.suggest("1"), engine.suggest("2")] == [{"a": 1}, None]


@pytest.mark.parametrize("algorithm", engines())
def test_a_search_of_constants_alone_suggests_them(algorithm):
    engine = make_engine(algorithm, space=Space.parse({"a": 1}), seed=0, trials=2)
    assert engine.suggest("1") == {"a": 1}
