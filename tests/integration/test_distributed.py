"""Several workers through Ray Train: the same training as one worker does in place."""

import pytest
import torch

from heliostat import Task
from heliostat.training.config import TrainConfig
from heliostat.training.run import run_training
from heliostat.training.seeding import seed_everything
from heliostat.training.world import World

SAME = ("train_loss", "val_loss", "val_accuracy")


@pytest.fixture
def alone(finished, monkeypatch):
    """The training of the finished run, done by one worker in this process."""
    monkeypatch.syspath_prepend(str(finished.folder))
    config = TrainConfig.model_validate(finished.record("train")["params"]["train"])
    task = Task(model="toy:build_model", data="toy:build_data", metrics=["toy:accuracy"])
    seed_everything(0)
    return run_training(task, config, world=World(0, 1, torch.device("cpu")), seed=0)


def test_two_workers_reach_what_one_reaches_at_the_same_global_batch(finished, alone):
    record = finished.record("train")
    for one, two in zip(alone.history, record["details"]["history"], strict=True):
        assert {name: two[name] for name in SAME} == pytest.approx({name: one[name] for name in SAME}, abs=1e-3)
    assert record["details"]["best_epoch"] == alone.epoch


def test_the_weights_of_two_workers_are_those_of_one(finished, alone):
    trained = torch.load(finished.path("train") / "weights.pt", weights_only=True)
    torch.testing.assert_close(trained, dict(alone.state), rtol=0, atol=1e-3)


def test_the_record_says_what_auto_took_and_by_which_memory(finished):
    details = finished.record("train")["details"]
    assert details["strategy"]["taken"] == "ddp"
    assert details["strategy"]["reason"].startswith("a whole copy takes")
    assert [row["strategy"] for row in details["memory"]] == ["ddp"]
    assert details["memory"][0]["activations_mb"] is not None
