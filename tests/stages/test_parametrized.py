"""Models with weights that are computed from others, pruned and factorized by the stages."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from heliostat.compression.formats import load_torch
from heliostat.compression.parametrizations import parametrizations
from heliostat.training.config import TrainConfig

MODELS = """
from torch import nn
from torch.nn import utils
from torch.nn.utils import parametrizations

NORMS = {
    "old": utils.weight_norm,
    "new": parametrizations.weight_norm,
    "spectral": parametrizations.spectral_norm,
    "old_spectral": utils.spectral_norm,
}


def build(kind):
    wrap = NORMS[kind]
    return nn.Sequential(wrap(nn.Linear(8, 16)), nn.ReLU(), wrap(nn.Linear(16, 16)), nn.ReLU(), nn.Linear(16, 3))
"""
KIND_NAMES = {"old": "weight norm", "new": "weight norm", "spectral": "spectral norm", "old_spectral": "spectral norm"}


@pytest.fixture
def trained_as(bench):
    """Trains a model with a norm of its weights: the bench, and the artifact."""
    (bench.root / "models.py").write_text(MODELS)

    def run(kind):
        task = bench.task.model_copy(update={"model": "models:build"})
        stand = replace(bench, task=task)
        config = TrainConfig(epochs=1, batch_size=16, model_args={"kind": kind}, optimizer={"lr": 0.01})
        return stand, stand.train(config)

    return run


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_pruning_and_factorizing_work_on_plain_weights_of_the_same_values_and_say_so(trained_as, kind):
    stand, trained = trained_as(kind)
    baked = {f"{name}.weight": KIND_NAMES[kind] for name in ("0", "2")}
    pruned = stand.run("prune", {"sparsity": 0.25, "finetune_epochs": 1}, model=trained)
    assert pruned.record.details["pruned"]["baked"] == baked
    smaller = load_torch(pruned.folder)
    assert [layer.out_features for layer in smaller if isinstance(layer, nn.Linear)] == [12, 12, 3]
    assert not parametrizations(smaller)

    thin = stand.run("factorize", {"rank": 2}, model=trained)
    assert thin.record.details["factorized"]["baked"] == baked
    assert load_torch(thin.folder)(torch.randn(4, 8)).shape == (4, 3)


@pytest.mark.parametrize(
    "config",
    [
        {"method": "magnitude", "sparsity": 0.5},
        {"sparsity": 0.25, "gradual_epochs": 2},
        {"penalty": {"name": "group_lasso", "epochs": 1, "threshold": 0.3}},
        {"sparsity": 0.25, "sensitivity": {"levels": [0.25, 0.5]}},
    ],
    ids=["magnitude", "gradual", "group_lasso", "sensitivity"],
)
def test_every_way_to_prune_takes_a_model_with_weight_norm(trained_as, config):
    stand, trained = trained_as("old")
    pruned = stand.run("prune", config, model=trained)
    assert pruned.record.details["pruned"]["baked"] == {"0.weight": "weight norm", "2.weight": "weight norm"}
    found = load_torch(pruned.folder)
    plain = [parameter for name, parameter in found.named_parameters() if name.endswith("weight")]
    before = 8 * 16 + 16 * 16 + 16 * 3
    assert sum(int((weight != 0).sum()) for weight in plain) < before
