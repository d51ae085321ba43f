"""What `max_drop` of static int8 tries, in order, and what it says of it."""

from dataclasses import replace

import pytest
import torch

from heliostat.compression.formats import load_model
from heliostat.errors import StageError
from heliostat.stages.models import describe, save_trained
from heliostat.training.config import TrainConfig
from heliostat.training.task import build_model

MODELS = '''
import torch
from torch import nn
from torch.utils.data import TensorDataset

import toy


def wide():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def convolutions():
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 8, 3), nn.ReLU(), nn.Conv1d(8, 3, 6), nn.Flatten()
    )


def build(kind):
    return {"wide": wide, "convolutions": convolutions}[kind]()


def shifted():
    """What is calibrated with is much smaller than what comes later: every range is too narrow."""
    data = toy.build_data()
    rows, targets = data["train"].tensors
    return {**data, "train": TensorDataset(0.01 * rows, targets)}
'''


@pytest.fixture
def stand(bench):
    """A bench where models of a kind are trained, changed, and then quantized."""
    (bench.root / "models.py").write_text(MODELS)

    def make(kind, *, change=lambda model: None, shifted=False):
        task = bench.task.model_copy(update={"model": "models:build"})
        config = TrainConfig(epochs=6, batch_size=16, model_args={"kind": kind}, optimizer={"lr": 0.02})
        trained = replace(bench, task=task).train(config)
        model = build_model(task, config.model_args)
        model.load_state_dict(torch.load(trained.folder / "weights.pt", weights_only=True))
        change(model)
        there = replace(bench, task=task.model_copy(update={"data": "models:shifted"}) if shifted else task)
        files = save_trained(there.context("train"), model.eval(), config=config)
        return there, there.keep("train", files=files, metrics=trained.metrics, params=trained.record.params)

    return make


def test_a_channel_that_takes_the_scale_from_the_others_gets_its_own(stand):
    @torch.no_grad()
    def one_huge_channel_that_never_fires(model):
        model[0].weight[0] *= 1000
        model[0].bias[0] = -1e5
        model[2].weight[:, 0] = 0

    there, trained = stand("wide", change=one_huge_channel_that_never_fires)
    config = {"per_channel": False, "max_drop": {"val_accuracy": 0.03}}
    details = there.run("quantize", config, model=trained).record.details
    assert details["chosen"] == "a scale for each channel"
    assert details["quantization"]["per_channel"] is True
    first, second, *_ = details["tried"]
    assert (first["tried"], first["within"], second["within"]) == ("as the file says", False, True)


def test_where_every_calibrated_range_is_wrong_the_model_is_dynamic(stand):
    there, trained = stand("wide", shifted=True)
    made = there.run("quantize", {"max_drop": {"val_accuracy": 0.03}}, model=trained)
    details = made.record.details
    assert details["chosen"] == "dynamic"
    assert describe(made.folder)["quantization"]["method"] == "dynamic"
    tried = [row["tried"] for row in details["tried"]]
    assert tried[0] == "as the file says"
    assert {"calibration by entropy", "calibration by percentile"} < set(tried)
    assert tried[-2:] == ["layer after layer in float", "dynamic"]
    assert [row.get("within") for row in details["tried"]][-1] is True
    assert load_model(made.folder)(torch.randn(2, 8)).shape == (2, 3)


def test_a_refusal_has_the_figures_of_all_that_was_tried(stand):
    there, trained = stand("convolutions", shifted=True)
    with pytest.raises(StageError) as error:
        there.run("quantize", {"max_drop": {"val_accuracy": 0.0}}, model=trained)
    text = str(error.value)
    assert text.startswith("no mix of int8 and float keeps within max_drop (val_accuracy 0); tried:")
    assert "as the file says: val_accuracy drops by" in text
    assert "calibration by entropy: val_accuracy drops by" in text
    assert "dynamic: dynamic quantisation finds nothing to quantise" in text


def test_what_keeps_within_the_limits_as_it_is_is_taken_without_a_search(stand):
    there, trained = stand("wide")
    details = there.run("quantize", {"max_drop": {"val_accuracy": 0.5}}, model=trained).record.details
    assert details["mixed_precision"]["left_in_float"] == []
    assert "tried" not in details
