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


class Encoder(nn.Module):
    def __init__(self, norm_first=False):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, norm_first=norm_first)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(32, 4)

    def forward(self, x, padding=None):
        return self.head(self.encoder(x, src_key_padding_mask=padding).mean(1))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("norm_first", [False, True])
def test_the_layers_of_a_transformer_encoder_become_thin_and_run_in_every_mode(norm_first):
    inputs = torch.randn(4, 7, 32)
    thin, history, kept = factorize(Encoder(norm_first), rank=4, example=inputs)
    assert {f"encoder.layers.{i}.{name}" for i in (0, 1) for name in ("linear1", "linear2")} == set(history[0]["ranks"])
    assert "MultiheadAttention" in kept["encoder.layers.0.self_attn"]
    rebuilt = replay(Encoder(norm_first), history)
    rebuilt.load_state_dict(thin.state_dict())
    padding = torch.zeros(4, 7, dtype=torch.bool)
    padding[:, 5:] = True
    for mask in (None, padding):
        with torch.no_grad():  # where full layers take the fused kernel
            assert torch.equal(rebuilt.eval()(inputs, mask), thin.eval()(inputs, mask))
    thin.train()(inputs).sum().backward()


class Shared(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.kind = kind
        if kind == "weight":
            self.second.weight = self.first.weight
        if kind == "layer":
            self.second = self.first
        if kind == "hook":
            self.first.register_forward_hook(lambda module, given, output: 2 * output)

    def forward(self, x):
        read = nn.functional.linear(x, self.first.weight) if self.kind == "read" else self.first(x)
        return self.third(self.second(read.relu()).relu())


@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        ("weight", {"first": "is also", "second": "is also"}),
        ("layer", {"first": "same layer"}),
        ("hook", {"first": "hooks"}),
        ("read", {"first": "has no attribute 'weight'"}),
    ],
)
def test_a_layer_that_something_else_relies_on_stays_as_it_is_with_the_reason(kind, kept):
    inputs = torch.randn(8, 32)
    model = Shared(kind)
    thin, history, reasons = factorize(model, rank=4, example=inputs)
    assert all(text in reasons[name] for name, text in kept.items())
    assert "third" in history[0]["ranks"]
    assert not history[0]["ranks"].keys() & kept.keys()
    assert sum(p.numel() for p in thin.parameters()) < sum(p.numel() for p in model.parameters())


class Standardised(nn.Conv2d):
    """Computes with other weights than its own."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


def test_a_layer_with_a_forward_of_its_own_is_not_replaced_by_plain_ones():
    model = nn.Sequential(Standardised(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
    _, (step,), kept = factorize(model, rank=2, example=torch.randn(4, 3, 8, 8))
    assert step["ranks"].keys() == {"2"}
    assert "outputs are not those" in kept["0"]
