"""int8 in a graph of `torch.export`: for torch, and for ExecuTorch where that is installed."""

from importlib.util import find_spec

import pytest
import torch

from heliostat.compression.export import save_onnx
from heliostat.compression.formats import load_model, read_record
from heliostat.compression.measure import compare_outputs
from heliostat.compression.programs import save_program
from heliostat.compression.quantize.pt2e import TARGETS, dynamic, layers_of, static
from heliostat.compression.size import num_params, size_mb
from heliostat.compression.verdict import has_int8_instructions
from heliostat.errors import ArtifactError, SpecError, StageError

executorch = pytest.mark.skipif(find_spec("executorch") is None, reason="executorch is not installed")
BACKENDS = ["torchao", pytest.param("executorch", marks=executorch)]


@pytest.fixture
def exact(tmp_path, nets, images):
    save_program(nets.ConvNet(width=64), tmp_path / "float", example=images, format="pt2")
    return tmp_path / "float"


@pytest.mark.parametrize("backend", BACKENDS)
def test_static_int8_is_smaller_and_close_to_the_float_model_at_any_batch_size(tmp_path, exact, images, backend, capfd):
    small = tmp_path / "int8"
    files = static(exact, small, backend=backend, example=images, calibration=images.split(8))
    assert files == ["model.json", f"model.{TARGETS[backend].format}"]
    assert compare_outputs(load_model(exact), load_model(small), images)["mean_abs_diff"] < 0.002
    assert [load_model(small)(images[:n]).shape for n in (1, 3)] == [(1, 5), (3, 5)]
    assert size_mb(small) < 0.6 * size_mb(exact)
    assert num_params(small) == num_params(exact)
    quantization = read_record(small)["quantization"]
    assert (quantization["backend"], quantization["method"]) == (backend, "static")
    assert quantization["calibration_rows"] == 32
    assert (quantization["int8_ops"], quantization["float_ops"]) == ({"Conv": 4, "Linear": 1}, {})
    assert quantization["int8_instructions"] is has_int8_instructions()
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("backend", BACKENDS)
def test_skipped_layers_stay_in_float_and_a_pattern_that_matches_none_is_refused(tmp_path, exact, images, backend):
    assert layers_of(exact) == ["stem", "block", "depthwise", "pointwise", "head"]
    given = {"backend": backend, "example": images, "calibration": [images]}
    static(exact, tmp_path / "int8", **given, per_channel=False, skip=["head", "p*"])
    quantization = read_record(tmp_path / "int8")["quantization"]
    assert (quantization["int8_ops"], quantization["float_ops"]) == ({"Conv": 3}, {"Conv": 1, "Linear": 1})
    with pytest.raises(SpecError, match=r"skip: 'haed' matches no layer; did you mean 'head'\?"):
        static(exact, tmp_path / "int8", **given, skip=["haed"])


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "Transformer", "mlp"])
def test_what_a_backend_does_not_quantize_stays_in_float(tmp_path, nets, sequences, backend, name):
    """That is recurrent layers, and torchao passes over what is inside attention."""
    model = nets.Recurrent(name) if name in ("LSTM", "GRU") else getattr(nets, name)()
    inputs = {"Transformer": torch.randint(50, (8, 7)), "mlp": sequences[:, 0]}.get(name, sequences)
    save_program(model, tmp_path / "float", example=inputs, format="pt2")
    static(tmp_path / "float", tmp_path / "int8", backend=backend, example=inputs, calibration=[inputs])
    exact, small = load_model(tmp_path / "float"), load_model(tmp_path / "int8")
    assert compare_outputs(exact, small, inputs)["mean_abs_diff"] < 0.02
    stays = {"LSTM": {"LSTM": 1}, "GRU": {"GRU": 1}, "Transformer": {"Linear": 4} if backend == "torchao" else {}}
    assert read_record(tmp_path / "int8")["quantization"]["float_ops"] == stays.get(name, {})


@executorch
def test_executorch_finds_ranges_at_every_call(tmp_path, nets):
    inputs = torch.randn(8, 6)
    save_program(nets.mlp(), tmp_path / "float", example=inputs, format="pt2")
    dynamic(tmp_path / "float", tmp_path / "int8", example=inputs)
    assert read_record(tmp_path / "int8")["quantization"]["int8_ops"] == {"Linear": 2}
    exact, small = load_model(tmp_path / "float"), load_model(tmp_path / "int8")
    for scale in (1, 100):
        assert compare_outputs(exact, small, scale * inputs)["mean_abs_diff"] < 0.01 * scale


def test_only_a_float_pt2_artifact_can_be_quantized(tmp_path, nets, exact, images):
    save_onnx(nets.ConvNet(), tmp_path / "onnx", example=images)
    given = {"backend": "torchao", "example": images, "calibration": [images]}
    with pytest.raises(ArtifactError, match="export it to pt2"):
        static(tmp_path / "onnx", tmp_path / "int8", **given)
    static(exact, tmp_path / "int8", **given)
    with pytest.raises(ArtifactError, match="quantized already"):
        static(tmp_path / "int8", tmp_path / "again", **given)


def test_a_graph_without_layers_that_int8_is_for_is_refused(tmp_path, images):
    save_program(torch.nn.Flatten(), tmp_path / "float", example=images, format="pt2")
    with pytest.raises(StageError, match=r"static quantization by torchao finds nothing .* no layer with weights"):
        static(tmp_path / "float", tmp_path / "int8", backend="torchao", example=images, calibration=[images])
