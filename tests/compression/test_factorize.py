import json

import pytest
import torch
from torch import nn

from heliostat.compression.factorize import factorize
from heliostat.compression.history import replay
from heliostat.errors import SpecError, StageError


def _of_rank(layer, rank):
    """Make the layer's weights a matrix of this rank."""
    matrix = layer.weight.data.flatten(1)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    layer.weight.data = ((u[:, :rank] * s[:rank]) @ vh[:rank]).view(layer.weight.shape)
    return layer


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(12, 10), (3, 12)),
        (nn.Conv2d(8, 12, 1, bias=False), (2, 8, 5, 5)),
        (nn.Conv2d(8, 12, 3, stride=2, padding=1, dilation=2), (2, 8, 9, 9)),
        (nn.Conv1d(8, 12, 5, padding=2, padding_mode="circular"), (2, 8, 9)),
    ],
    ids=["linear", "1x1", "3x3", "1d"],
)
def test_a_layer_of_low_rank_is_computed_exactly_by_two_thin_ones(layer, shape):
    model, inputs = nn.Sequential(_of_rank(layer, 2)), torch.randn(shape)
    thin, history, _ = factorize(model, rank=2)
    assert torch.allclose(thin(inputs), model(inputs), atol=1e-5)
    assert sum(p.numel() for p in thin.parameters()) < sum(p.numel() for p in model.parameters())
    by_energy, same, _ = factorize(model, energy=0.9999)
    assert same == history == [{"op": "factorize", "ranks": {"0": 2}}]
    assert torch.allclose(by_energy(inputs), model(inputs), atol=1e-5)


def test_the_energy_decides_how_much_of_the_weights_is_kept():
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    thin, ((step),), _ = factorize(model, energy=0.6)
    error = (thin[0][1].weight @ thin[0][0].weight - model[0].weight).square().sum() / model[0].weight.square().sum()
    assert 0.35 < error < 0.4
    assert 1 < step["ranks"]["0"] < 32


def test_a_history_rebuilds_every_kind_of_layer(nets, images):
    model = nets.ConvNet(width=16)
    thin, history, kept = factorize(model, rank=6)
    assert set(history[0]["ranks"]) == {"block", "pointwise"}
    assert kept["head"] == "at rank 5 its 5x32 weights would not get fewer"
    assert "groups" in kept["depthwise"]
    rebuilt = replay(nets.ConvNet(width=16), json.loads(json.dumps(history)))
    rebuilt.load_state_dict(thin.state_dict())
    assert torch.equal(rebuilt.eval()(images), thin.eval()(images))


def test_layers_that_read_their_own_weights_are_left_alone_with_a_reason(nets):
    _, history, kept = factorize(nets.Transformer(), rank=2)
    assert kept["encoder.layers.0.self_attn.out_proj"].startswith("MultiheadAttention")
    assert "encoder.layers.0.linear1" in history[0]["ranks"]
    assert factorize(nets.Recurrent("GRU"), rank=2)[2]["layer"].startswith("GRU")


def test_what_cannot_get_smaller_and_impossible_settings_are_refused(nets):
    with pytest.raises(StageError, match=r"no layer gets smaller: .* 0: at rank 6 its 16x6 weights"):
        factorize(nets.mlp(), rank=100, skip=["2"])
    with pytest.raises(SpecError, match="'3' matches no layer"):
        factorize(nets.mlp(), rank=2, skip=["3"])
    for settings in ({}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"energy": 1.5}, {"energy": 0.0}):
        with pytest.raises(SpecError, match=r"rank|energy"):
            factorize(nets.mlp(), **settings)
