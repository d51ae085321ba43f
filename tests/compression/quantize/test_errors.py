"""Which tensors of an int8 graph are harmed by their rounding."""

import torch
from torch import nn

from heliostat.compression.export import save_onnx
from heliostat.compression.formats import load_model
from heliostat.compression.quantize.errors import blamed, rounding_errors
from heliostat.compression.quantize.post_training import dynamic, static


def _quantized(tmp_path, model, inputs, **settings):
    save_onnx(model, tmp_path / "float", example=inputs)
    static(tmp_path / "float", tmp_path / "int8", calibration=[inputs], **settings)
    return rounding_errors(tmp_path / "int8" / "model.onnx", inputs)


class Sides(nn.Module):
    """Two outputs in one tensor, of which one is a thousand times the other."""

    def __init__(self):
        super().__init__()
        self.large, self.small = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        return torch.cat([1000 * self.large(x), self.small(x)], 1)


class Between(Sides):
    """The same within the network, where a layer scales and mixes them."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(6, 2)

    def forward(self, x):
        return self.last(super().forward(x))


def test_an_output_in_which_a_small_channel_shares_its_scale_with_a_large_one_is_blamed(tmp_path):
    inputs = torch.randn(64, 6)
    errors = _quantized(tmp_path, Sides(), inputs)
    assert [(error.layer, error.kind) for error in blamed(errors)] == [("/Concat", "Concat")]
    errors = _quantized(tmp_path, Sides(), inputs, skip=["/Concat"])
    assert blamed(errors) == []


def test_channels_that_a_layer_mixes_are_judged_together(tmp_path):
    assert blamed(_quantized(tmp_path, Between(), torch.randn(64, 6))) == []


def test_a_healthy_network_with_rectifiers_has_nothing_to_blame(tmp_path, nets, images):
    model = nets.ConvNet().eval()
    nn.init.zeros_(model.head.bias)  # untrained, it gives nearly the same for every image
    nn.init.orthogonal_(model.head.weight)
    errors = _quantized(tmp_path, model, images + torch.randn(32, 1, 1, 1))
    assert errors
    assert blamed(errors) == []


def test_a_range_that_an_outlier_stretches_is_blamed(tmp_path):
    model, inputs = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(64, 6)
    wild = torch.cat([inputs, torch.full((1, 6), 3e4)])
    save_onnx(model, tmp_path / "float", example=inputs)
    static(tmp_path / "float", tmp_path / "int8", calibration=[wild])
    assert "input" in [error.layer for error in blamed(rounding_errors(tmp_path / "int8" / "model.onnx", inputs))]


def test_dynamic_ranges_are_in_no_graph(tmp_path, nets):
    inputs = torch.randn(8, 6)
    save_onnx(nets.mlp(), tmp_path / "float", example=inputs)
    dynamic(tmp_path / "float", tmp_path / "int8")
    assert rounding_errors(tmp_path / "int8" / "model.onnx", inputs) == []
    assert load_model(tmp_path / "int8")(inputs).shape == (8, 5)
