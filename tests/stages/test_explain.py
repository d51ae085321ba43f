"""`plan` says how a strategy will spread the model and how a search will go, without training anything."""

import pytest

from heliostat.core.load import load_pipeline
from heliostat.runner import plan


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("tp", "tp: 0 colwise, 2 rowwise"),
        ("pp", "pp: from 0 144 parameters, from 2 323 parameters"),
        ({"fsdp": {"wrap": "Linear"}}, "fsdp: 3 units and the rest, over 2 workers"),
    ],
    ids=["tp", "pp", "fsdp"],
)
def test_the_plan_shows_what_a_strategy_will_do(toy, strategy, expected):
    document = toy.document
    train = document["stages"][1]
    del train["inputs"]
    train |= {"config": {"strategy": strategy}, "resources": {"workers": 2}}
    document["stages"] = [train]
    toy.write(document)
    assert plan(load_pipeline(toy.file)).node("train").explained == {"strategy": expected}


SMALL = {"batch_size": {"choice": [16, 32]}, "model_args.width": {"choice": [4, 8]}}
LARGE = {"optimizer.lr": {"loguniform": [1e-4, 1e-1]}}


@pytest.fixture
def explained(toy):
    """What the plan says of a search with this config, on `at_once` trials at a time."""

    def explain(*, at_once=2, **config):
        document = toy.document
        document["stages"] = [
            {"name": "search", "uses": "tune", "config": config, "resources": {"max_concurrent_trials": at_once}}
        ]
        return plan(load_pipeline(toy.write(document))).node("search").explained

    return explain


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"space": SMALL, "algorithm": "grid"}, "grid, every one of 4 points"),
        ({"space": SMALL}, "grid, the space has only 4 points"),
        ({"space": LARGE, "trials": 8}, "random, 8 trials are too few to learn a model of the space from"),
        ({"space": LARGE, "trials": 40}, "bayesian, 40 trials suffice to learn where the space is good"),
        ({"space": LARGE, "algorithm": "optuna_tpe"}, "optuna_tpe, as asked"),
        (
            {"space": LARGE, "trials": 40, "objectives": ["val_accuracy", {"latency_ms": "min"}]},
            "optuna_tpe, 40 trials suffice to learn where the space is good, and unlike bayesian it takes several "
            "objectives",
        ),
        (
            {"space": LARGE, "trials": 40, "limits": {"size_mb": 0.5}},
            "optuna_tpe, 40 trials suffice to learn where the space is good, and unlike bayesian it models how far "
            "beyond the limits a trial is",
        ),
    ],
)
def test_the_plan_shows_which_algorithm_a_search_takes_and_why(explained, config, expected):
    assert explained(**config) == {"algorithm": expected}


@pytest.mark.parametrize(
    ("asha", "more", "expected"),
    [
        ({"grace_epochs": 4}, {}, "asha saves nothing: no trial stops within 4 epochs, and 4 are all there are"),
        ({"reduction_factor": 9}, {}, "asha has nothing to choose from: it keeps one trial in 9 of 8"),
        ({}, {"at_once": 8}, "asha saves little: all 8 trials run at once"),
        ({}, {}, None),
    ],
)
def test_the_plan_warns_of_an_asha_that_stops_nothing(explained, asha, more, expected):
    found = explained(space=LARGE, trials=8, train={"epochs": 4}, scheduler={"asha": asha}, **more).get("scheduler")
    assert found is None if expected is None else found.startswith(expected)
