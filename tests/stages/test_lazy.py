"""A model with lazy layers goes through every stage as another one does."""

import pytest

from heliostat.core.imports import use_root
from heliostat.stages.measure import measure_quality
from heliostat.training.config import TrainConfig

LAZY = """

def build_model(width=16, bias=True):
    return nn.Sequential(nn.LazyLinear(width), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(width), nn.LazyLinear(3))
"""


@pytest.fixture
def lazy(bench, toy):
    toy.module.write_text(toy.module.read_text() + LAZY)
    use_root(toy.folder)
    return bench


def test_a_model_with_lazy_layers_is_pruned_distilled_quantized_and_exported(lazy):
    trained = lazy.train(TrainConfig(epochs=1, batch_size=32))
    pruned = lazy.run("prune", {"finetune_epochs": 1}, model=trained)
    made = [
        pruned,
        lazy.run("distill", {"epochs": 1, "model_args": {"width": 8}}, teacher=pruned),
        lazy.run("factorize", {"rank": 2}, model=trained),
        lazy.run("quantize", model=trained),
        lazy.run("export", {"format": "pt2"}, model=trained),
    ]
    whole, *others = (
        measure_quality(artifact.folder, lazy.task, artifact.record.params)["num_params"]
        for artifact in (trained, *made)
    )
    assert 0 < others[0] < whole == others[-1]
