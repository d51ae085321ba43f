"""int8 weights in a torch model."""

import pytest
import torch

from heliostat.compression.formats import load_model, save_torch
from heliostat.compression.macs import num_macs
from heliostat.compression.prune.structured import structured
from heliostat.compression.quantize.eager import quantize_linear
from heliostat.compression.size import num_nonzero, num_params, size_mb
from heliostat.errors import SpecError, StageError


@pytest.mark.parametrize("scheme", ["dynamic", "weight_only"])
def test_a_pruned_and_quantized_torch_model_loads_from_its_history_and_is_smaller(tmp_path, nets, code, scheme):
    inputs, arguments = torch.randn(4, 64), {"inputs": 64, "hidden": 256, "classes": 5}
    pruned, history = structured(nets.mlp(**arguments), example=inputs, sparsity=0.5)
    small, more = quantize_linear(pruned, scheme=scheme)
    known = {"reference": "nets:mlp", "model_args": arguments, "example": inputs, "code": code}
    save_torch(pruned, tmp_path / "float", history=history, **known)
    save_torch(small, tmp_path / "int8", history=[*history, *more], macs=num_macs(pruned, inputs), **known)
    assert torch.equal(load_model(tmp_path / "int8")(inputs), small(inputs))
    assert 0 < (small(inputs) - pruned(inputs)).abs().mean() < 0.02
    assert size_mb(tmp_path / "int8") < 0.5 * size_mb(tmp_path / "float")
    assert num_params(tmp_path / "int8") == num_params(tmp_path / "float")
    assert num_nonzero(tmp_path / "int8") > 0.95 * num_params(tmp_path / "int8")


def test_skipped_layers_stay_in_float_and_a_model_without_linear_layers_is_refused(nets):
    small, (step,) = quantize_linear(nets.mlp(), scheme="weight_only", skip=["0"])
    assert step["layers"] == ["2"]
    assert type(small[0].weight) is torch.nn.Parameter
    with pytest.raises(SpecError, match="'one' matches no layer"):
        quantize_linear(nets.mlp(), scheme="weight_only", skip=["one"])
    with pytest.raises(StageError, match="no linear layer"):
        quantize_linear(torch.nn.Conv2d(1, 1, 1), scheme="dynamic")
