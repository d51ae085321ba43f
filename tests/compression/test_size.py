import pytest
import torch

from heliostat.compression.export import save_onnx
from heliostat.compression.formats import save_torch
from heliostat.compression.prune.masks import magnitude
from heliostat.compression.quantize.post_training import dynamic, static, weight_only
from heliostat.compression.size import num_nonzero, num_params, size_mb, size_zip_mb


@pytest.fixture
def sparse(nets):
    """9 of 10 weights are zero; of 64 * 32 + 32 * 5 weights and 37 biases."""
    model = nets.mlp(64, 32, 5)
    magnitude(model, sparsity=0.9, scope="layer")
    return model


def test_zeros_are_told_from_other_parameters_in_every_format(tmp_path, sparse, code):
    inputs, nonzero = torch.randn(32, 64), sum(int(p.count_nonzero()) for p in sparse.parameters())
    arguments = {"inputs": 64, "hidden": 32, "classes": 5}
    save_torch(sparse, tmp_path / "torch", reference="nets:mlp", model_args=arguments, example=inputs, code=code)
    save_onnx(sparse, tmp_path / "onnx", example=inputs)
    static(tmp_path / "onnx", tmp_path / "static", calibration=[inputs])
    dynamic(tmp_path / "onnx", tmp_path / "dynamic")
    for name in ("torch", "onnx", "static", "dynamic"):
        assert num_params(tmp_path / name) == 64 * 32 + 32 * 5 + 37
        assert num_nonzero(tmp_path / name) == pytest.approx(nonzero, abs=8)  # small weights may round to zero
    weight_only(tmp_path / "onnx", tmp_path / "4", bits=4)
    assert num_params(tmp_path / "4") == 64 * 32 + 32 * 5 + 37


def test_zeros_make_the_zipped_file_smaller_and_no_other(tmp_path, nets, sparse):
    inputs = torch.randn(2, 64)
    save_onnx(nets.mlp(64, 32, 5), tmp_path / "dense", example=inputs)
    save_onnx(sparse, tmp_path / "sparse", example=inputs)
    assert size_mb(tmp_path / "sparse") == size_mb(tmp_path / "dense")
    assert size_zip_mb(tmp_path / "sparse") < 0.4 * size_zip_mb(tmp_path / "dense") < 0.4 * size_mb(tmp_path / "dense")
