"""`plan` says how a strategy will spread the model and how a search will go, without training anything."""

import pytest

from heliostat.core.load import load_pipeline
from heliostat.runner import plan


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("tp", "tp: 0 colwise, 2 rowwise; whole on every worker: 4"),
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


@pytest.fixture
def told(toy, monkeypatch):
    """What the plan says of training with two workers on a node of so many bytes."""

    def tell(node_bytes, *, train_fn=None, **config):
        monkeypatch.setattr("heliostat.training.devices.node_memory_bytes", lambda: node_bytes)
        document = toy.document
        document["task"] |= {"train_fn": train_fn} if train_fn else {}
        train = document["stages"][1]
        del train["inputs"]
        train |= {"config": config, "resources": {"workers": 2}}
        document["stages"] = [train]
        return plan(load_pipeline(toy.write(document))).node("train")

    return tell


def test_the_plan_shows_the_memory_that_auto_goes_by_and_what_it_takes(told):
    explained = told(10_000_000).explained
    assert explained["strategy"] == (
        "auto takes ddp on this machine: a whole copy takes 14.9 KB of a device's 5 MB; the activations, for "
        "which strategy.auto.sample would do, are counted when it trains"
    )
    heading, row = (line.split() for line in explained["memory of a worker"].splitlines() if line)
    assert heading == ["parameters", "gradients", "optimizer", "copies", "activations", "total"]
    assert row == ["ddp", "1.87", "KB", "1.87", "KB", "3.74", "KB", "7.47", "KB", "not", "known", "14.9", "KB"]


def test_told_of_a_sample_the_plan_counts_activations_too(told):
    explained = told(10_000_000, strategy={"auto": {"sample": [8]}}).explained
    assert "activations" not in explained["strategy"]
    assert "not known" not in explained["memory of a worker"]


def test_what_auto_would_take_is_no_part_of_identity(told):
    small, large = told(30_000), told(10_000_000)
    assert small.fingerprint == large.fingerprint
    assert "auto takes ddp" not in small.explained["strategy"]


def test_under_an_own_loop_the_plan_says_what_auto_would_take_and_what_it_does_not_know(toy, told):
    toy.module.write_text(toy.module.read_text() + "\n\ndef train_fn(context, config): ...\n")
    explained = told(28_000, train_fn="toy:train_fn").explained
    assert explained["strategy"].startswith("auto takes fsdp on this machine: a whole copy takes 14.9 KB")
    assert explained["strategy"].endswith(
        "of task.train_fn it knows the weights alone, and config.optimizer, but not what it computes"
    )


SMALL = {"batch_size": {"choice": [16, 32]}, "model_args.width": {"choice": [4, 8]}}
LARGE = {"optimizer.lr": {"loguniform": [1e-4, 1e-1]}}


@pytest.fixture
def explained(toy):
    """What the plan says of a search with this config, on `at_once` trials at a time."""

    def explain(*, at_once=2, cpus_per_worker=1, gpus_per_worker=0.0, **config):
        resources = {
            "max_concurrent_trials": at_once,
            "cpus_per_worker": cpus_per_worker,
            "gpus_per_worker": gpus_per_worker,
        }
        document = toy.document
        document["stages"] = [{"name": "search", "uses": "tune", "config": config, "resources": resources}]
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
    assert explained(**config)["algorithm"] == expected


def test_the_plan_shows_with_what_a_search_that_learns_begins(explained):
    space = {**LARGE, "model_args.width": {"choice": [4, 8]}, "batch_size": {"choice": [16, 32]}}
    begun = explained(space=space, trials=40, train={"batch_size": 16})
    expected = "what config.train comes to without a search: optimizer.lr 0.001, batch_size 16"
    assert begun["first trial"] == expected
    assert "first trial" not in explained(
        space=space, trials=40, start_from={"optimizer.lr": 0.01, "batch_size": 32, "model_args.width": 4}
    )
    assert "first trial" not in explained(space=space, algorithm="random")


def test_the_plan_shows_what_a_trials_model_goes_through(explained):
    passes = [{"prune": {"sparsity": 0.3}}, {"quantize": {}}]
    expected = (
        "trials are compared by their models after prune (structured), then quantize (static), made anew each time"
    )
    assert explained(space=LARGE, evaluate_after=passes)["evaluate_after"] == expected


@pytest.mark.parametrize(
    ("scheduler", "at_once", "expected"),
    [
        ({"asha": {"grace_epochs": 4}}, 2, "asha saves nothing: no trial stops within 4 epochs, and 4 are all"),
        ({"asha": {"reduction_factor": 9}}, 2, "asha has nothing to choose from: it keeps one trial in 9 of 8"),
        ("asha", 8, "asha saves little: all 8 trials may run at once"),
        ("asha", 2, None),
        ({"median": {"grace_epochs": 5}}, 2, "median saves nothing: no trial stops within 5 epochs, and 4 are all"),
        ({"median": {"min_trials": 8}}, 2, "median stops nothing: it compares a trial with 8 others, and there are 7"),
        ("median", 8, "median saves little: all 8 trials may run at once"),
        ({"median": {"min_trials": 7}}, 2, None),
        ("none", 8, None),
    ],
)
def test_the_plan_warns_of_a_scheduler_that_stops_nothing(explained, scheduler, at_once, expected):
    told = explained(space=LARGE, trials=8, train={"epochs": 4}, scheduler=scheduler, at_once=at_once)
    found = told.get("scheduler")
    assert found is None if expected is None else found.startswith(expected)


@pytest.mark.parametrize(("gpus", "warned"), [(0.0, True), (0.5, False)])
def test_how_many_trials_run_at_once_on_unknown_gpus_is_not_guessed(explained, gpus, warned):
    told = explained(space=LARGE, trials=4, scheduler="asha", at_once=None, cpus_per_worker=0.01, gpus_per_worker=gpus)
    assert ("scheduler" in told) == warned


def test_the_plan_says_what_splitting_a_batch_does_to_loss_and_batch_norm(toy):
    document = toy.document
    train = document["stages"][1]
    del train["inputs"]
    document["stages"] = [train]
    document["task"]["loss"] = "torch.nn.functional:mse_loss"

    def explained(config, workers=1):
        train.update({"config": config, "resources": {"workers": workers}})
        return plan(load_pipeline(toy.write(document))).node("train").explained

    assert explained({}) == {}
    assert explained({"accumulate_steps": 4}) == {
        "split_loss": "torch.nn.functional:mse_loss must be a mean over samples or (sum, weight), as is checked before "
        "training",
        "batch norm": "if any, by each of the 4 parts of a batch, not by all of it",
    }
    several = explained({"strategy": "ddp", "split_loss": "average", "sync_batch_norm": False}, workers=2)
    assert "may depend on the number of workers" in several["split_loss"]
    assert "so the curve depends on the number of workers" in several["batch norm"]
