"""An engine that suggests no point twice, and puts off what would wait for another trial."""

import pytest

from heliostat.core.objective import Costs
from heliostat.core.space import Space
from heliostat.runtime.engines import engines
from heliostat.runtime.making import Distinct

SMALL = Space.parse(
    {"a": {"choice": ["x", {"value": "y", "space": {"b": {"choice": [1, 2, 3]}}}]}, "c": {"choice": [0, 1]}}
)


def alone(point):
    """No two points have a part in common."""
    return [str(point)]


def suggestions(algorithm, count, *, start=()):
    engine = Distinct(engines()[algorithm].make(SMALL, num_objectives=2, seed=0, trials=count), SMALL, alone, seed=0)
    points = []
    for index in range(count):
        trial = f"{index:04d}"
        if index < len(start):
            point = start[index]
            engine.adopt(trial, point)
        else:
            point = engine.suggest(trial)
        if point is None:
            break
        points.append(point)
        engine.observe(trial, Costs((len(str(point)), -len(points))) if index % 3 else None)
    return points


@pytest.mark.parametrize("algorithm", ["grid", "random", "optuna_tpe"])
def test_every_point_of_a_small_space_comes_once_and_then_there_is_nothing_left(algorithm):
    start = [{"a": "y", "b": 2, "c": 1}]
    points = suggestions(algorithm, 20, start=start)
    assert sorted(points, key=str) == sorted(SMALL.grid(), key=str)
    assert points[0] == start[0]


def test_the_same_seed_and_outcomes_give_the_same_suggestions():
    assert suggestions("optuna_tpe", 6) == suggestions("optuna_tpe", 6)


def test_what_runs_at_the_moment_is_not_suggested_again():
    engine = Distinct(engines()["random"].make(SMALL, num_objectives=1, seed=0, trials=8), SMALL, alone, seed=0)
    points = [engine.suggest(f"{index:04d}") for index in range(8)]
    assert len({str(point) for point in points}) == 8
    assert engine.suggest("0008") is None
    assert all(point in SMALL.grid() for point in points)


PAIRS = Space.parse({"first": {"choice": ["x", "y", "z"]}, "then": {"choice": [1, 2]}})


def beginnings(point):
    return [point["first"], f"{point['first']}{point['then']}"]


def test_what_another_trial_is_making_is_put_off_and_comes_once_it_is_there():
    engine = Distinct(engines()["grid"].make(PAIRS, num_objectives=1, seed=0, trials=6), PAIRS, beginnings, seed=0)
    named = lambda point: f"{point['first']}{point['then']}"  # noqa: E731
    assert [named(engine.suggest(trial)) for trial in ("1", "2", "3")] == ["x1", "y1", "z1"]
    engine.observe("2", Costs((1.0,)))
    assert named(engine.suggest("4")) == "y2"
    assert named(engine.suggest("5")) == "x2"  # there is none that need not wait
    engine.observe("3", None)
    assert named(engine.suggest("6")) == "z2"
    assert engine.suggest("7") is None


@pytest.mark.parametrize("algorithm", ["grid", "random", "optuna_tpe"])
def test_every_point_comes_once_however_many_trials_run_at_a_time(algorithm):
    engine = Distinct(engines()[algorithm].make(PAIRS, num_objectives=1, seed=0, trials=6), PAIRS, beginnings, seed=0)
    points, running = [], []
    while (point := engine.suggest(str(len(points)))) is not None:
        running.append(str(len(points)))
        points.append(point)
        if len(running) == 2:
            engine.observe(running.pop(0), Costs((float(len(points)),)))
    assert sorted(points, key=str) == sorted(PAIRS.grid(), key=str)
