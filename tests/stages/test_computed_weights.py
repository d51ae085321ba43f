"""Layers that compute their weights (weight norm and spectral norm, old and new) through int8 and export."""

from dataclasses import replace

import pytest

from heliostat.stages.measure import measure_quality
from heliostat.training.config import TrainConfig

MODELS = """
from torch import nn
from torch.nn.utils import parametrizations

KINDS = {
    "weight norm": parametrizations.weight_norm,
    "weight norm by hooks": nn.utils.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "spectral norm by hooks": nn.utils.spectral_norm,
}


def build(kind):
    norm = KINDS[kind]
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)), norm(nn.Conv1d(1, 8, 3, padding=1)), nn.ReLU(), nn.Flatten(), norm(nn.Linear(64, 16)),
        nn.ReLU(), nn.Linear(16, 3),
    )
"""
KINDS = ("weight norm", "weight norm by hooks", "spectral norm", "spectral norm by hooks")
INT8 = [
    {},
    {"method": "dynamic"},
    {"method": "weight_only"},
    {"backend": "torchao"},
    {"backend": "torchao", "method": "dynamic"},
    {"backend": "torchao", "method": "weight_only"},
]


@pytest.fixture(params=KINDS)
def normed(request, bench):
    """A bench and a model that it trained for four epochs."""
    (bench.root / "models.py").write_text(MODELS)
    stand = replace(bench, task=bench.task.model_copy(update={"model": "models:build"}))
    config = TrainConfig(epochs=4, batch_size=16, model_args={"kind": request.param}, optimizer={"lr": 0.01})
    return stand, stand.train(config)


def val_loss(stand, artifact):
    return measure_quality(artifact.folder, stand.task, artifact.record.params)["val_loss"]


def test_every_form_of_the_model_gives_what_the_model_gives(normed):
    stand, trained = normed
    loss = val_loss(stand, trained)
    for config in ({}, {"format": "pt2"}):
        assert val_loss(stand, stand.run("export", config, model=trained)) == pytest.approx(loss, abs=1e-4), config
    for config in INT8:
        assert val_loss(stand, stand.run("quantize", config, model=trained)) == pytest.approx(loss, abs=0.05), config


def test_a_model_that_learned_under_rounding_is_saved_as_it_was_validated(normed):
    stand, trained = normed
    for backend in ("onnxruntime", "torchao"):
        config = {"method": "qat", "backend": backend, "finetune_epochs": 2}
        int8 = stand.run("quantize", config, model=trained)
        assert val_loss(stand, int8) == pytest.approx(int8.metrics["val_loss"], abs=0.03), backend
        assert int8.record.details["not_rounded"] == {}
