"""Architecture search by weight sharing on a toy network of elastic width and depth."""

import random
import shutil
from dataclasses import replace
from statistics import mean

import pytest
import torch

from heliostat.compression.formats import load_model
from heliostat.errors import SpecError, StageError
from heliostat.stages.measure import measure_quality
from heliostat.training.config import TrainConfig
from heliostat.training.loop import fit
from heliostat.training.seeding import seed_everything
from heliostat.training.task import build_data, build_model, build_objective

ELASTIC = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width=16, depth=3, classes=3):
        super().__init__()
        self.stem = nn.Linear(8, width)
        self.norm = nn.BatchNorm1d(width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = x + torch.relu(block(x))
        return self.head(x)


def build_chain(depth=2):
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(depth)), nn.Linear(8, 3))
"""
CONFIG = {
    "elastic": {"model_args.width": [4, 8, 16], "model_args.depth": [1, 2, 3]},
    "epochs": 6,
    "optimizer": {"lr": 0.01},
}


@pytest.fixture
def elastic(bench):
    """The toy's data for a network whose width and depth can vary."""
    (bench.root / "elastic.py").write_text(ELASTIC)
    return replace(bench, task=bench.task.model_copy(update={"model": "elastic:Net"}))


def test_the_winner_is_an_ordinary_model_that_fine_tunes_and_prunes_on(elastic):
    found = elastic.run("nas", {**CONFIG, "max_drop": {"val_accuracy": 0.05}, "finetune_epochs": 1})
    details = found.record.details
    assert len(details["subnets"]) == 9
    assert {"width", "depth", "val_accuracy", "latency_ms", "num_params", "front"} <= details["subnets"][0].keys()
    assert len(details["history"]) == 7
    arguments = {path.removeprefix("model_args."): value for path, value in details["winner"].items()}
    assert found.record.params["train"]["model_args"] == arguments
    assert details["parity"]["reload"]["max_abs_diff"] == 0
    assert load_model(found.folder)(torch.randn(4, 8)).shape == (4, 3)
    pruned = elastic.run("prune", {"sparsity": 0.25}, model=found)
    assert pruned.record.details["parity"]["reload"]["max_abs_diff"] == 0


def test_the_fastest_within_the_drop_wins_and_without_a_drop_the_best(elastic):
    found = elastic.run("nas", {**CONFIG, "max_drop": {"val_accuracy": 0.05}})
    rows = found.record.details["subnets"]
    before = next(row for row in rows if (row["width"], row["depth"]) == (16, 3))["val_accuracy"]
    winner = min((row for row in rows if row["val_accuracy"] >= before - 0.05 - 1e-9), key=lambda r: r["latency_ms"])
    arguments = found.record.params["train"]["model_args"]
    assert arguments == {"width": winner["width"], "depth": winner["depth"]}
    assert found.record.metrics["val_accuracy"] == winner["val_accuracy"]
    measured = measure_quality(found.folder, elastic.task, found.record.params)
    assert measured["val_accuracy"] == pytest.approx(winner["val_accuracy"], abs=1e-6)

    best = elastic.run("nas", CONFIG).record
    assert best.metrics["val_accuracy"] == max(row["val_accuracy"] for row in best.details["subnets"])


def test_a_large_space_is_searched_by_as_many_subnets_as_there_are_trials(elastic):
    wide = {"elastic": {"model_args.width": list(range(2, 17)), "model_args.depth": [1, 2, 3]}, "trials": 12}
    rows = elastic.run("nas", {**CONFIG, **wide, "epochs": 1}).record.details["subnets"]
    assert 4 <= len(rows) <= 13
    assert any(row["front"] for row in rows)


def test_a_search_that_was_cut_off_ends_as_if_it_had_not_been(elastic, monkeypatch):
    config = {**CONFIG, "epochs": 3}
    expected = elastic.run("nas", config).record.details["history"]
    shutil.rmtree(elastic.store / "nas")

    def cut_off(reporter, values, *, step, trial=None):
        if step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(elastic.context("nas").reporter), "metrics", cut_off)
        with pytest.raises(KeyboardInterrupt):
            elastic.run("nas", config)
    found = elastic.run("nas", config).record.details["history"]
    assert [row["train_loss"] for row in found] == [row["train_loss"] for row in expected]


def test_the_winner_is_no_worse_than_random_subnets_trained_alone_for_the_same_budget(elastic):
    """The budget is passes of the data through a network: four in an epoch of the sandwich, one in any other."""
    winner = elastic.run("nas", {**CONFIG, "finetune_epochs": 8}).record.metrics["val_accuracy"]
    data, objective, draws = build_data(elastic.task, {}), build_objective(elastic.task), random.Random(0)
    alone = []
    for _ in range(3):
        arguments = {path[len("model_args.") :]: draws.choice(values) for path, values in CONFIG["elastic"].items()}
        config = TrainConfig(epochs=4 * CONFIG["epochs"] + 8, optimizer=CONFIG["optimizer"])
        seed_everything(0)
        fitted = fit(build_model(elastic.task, arguments), data, config, objective=objective, seed=0)
        alone.append(fitted.metrics["val_accuracy"])
    assert winner >= mean(alone)


@pytest.mark.parametrize(
    ("model", "config", "error", "expected"),
    [
        (
            "elastic:build_chain",
            {"elastic": {"model_args.depth": [1, 2]}},
            SpecError,
            "elastic.model_args.depth: with 1 it leaves out '2.weight' and makes '1.weight'",
        ),
        (
            "elastic:Net",
            {"elastic": {"model_args.width": [16, 8]}},
            SpecError,
            "elastic.model_args.width: with 16 the parameter 'stem.weight' (16, 8) is no slice",
        ),
        ("elastic:Net", {"model_args": {"classes": 1}}, StageError, "nothing is learned"),
    ],
    ids=["depth moves the head", "from large to small", "one output"],
)
def test_what_cannot_share_weights_is_named(elastic, model, config, error, expected):
    bench = replace(elastic, task=elastic.task.model_copy(update={"model": model}))
    with pytest.raises(error) as caught:
        bench.run("nas", {**CONFIG, **config})
    assert expected in str(caught.value)
