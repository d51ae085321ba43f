"""int8 in a `.tflite`, where LiteRT is installed."""

from importlib.util import find_spec

import pytest
import torch

from heliostat.compression.formats import load_model, read_record
from heliostat.compression.measure import compare_outputs
from heliostat.compression.programs import save_program
from heliostat.compression.quantize.litert import dynamic, layers_of, static, weight_only
from heliostat.compression.size import num_params, size_mb
from heliostat.errors import SpecError

pytestmark = pytest.mark.skipif(find_spec("litert_torch") is None, reason="litert_torch is not installed")


@pytest.fixture
def exact(tmp_path, nets, images):
    save_program(nets.ConvNet(width=64), tmp_path / "float", example=images, format="tflite")
    return tmp_path / "float"


def test_static_int8_is_smaller_and_close_to_the_float_model_and_takes_floats(tmp_path, exact, images, capfd):
    small = tmp_path / "int8"
    assert static(exact, small, calibration=images.split(8)) == ["model.json", "model.tflite"]
    assert compare_outputs(load_model(exact), load_model(small), images)["mean_abs_diff"] < 0.002
    assert load_model(small)(images[:3]).dtype == torch.float32
    assert size_mb(small) < 0.5 * size_mb(exact)
    assert num_params(small) == num_params(exact)
    quantization = read_record(small)["quantization"]
    assert (quantization["backend"], quantization["calibration_rows"]) == ("litert", 32)
    assert (quantization["int8_ops"], quantization["float_ops"]) == ({"Conv": 4, "Linear": 1}, {})
    assert capfd.readouterr().out == ""


def test_skipped_layers_stay_in_float_and_a_pattern_that_matches_none_is_refused(tmp_path, exact, images):
    assert layers_of(exact) == ["stem", "block", "depthwise", "pointwise", "head"]
    static(exact, tmp_path / "int8", calibration=[images], per_channel=False, skip=["head", "p*"])
    quantization = read_record(tmp_path / "int8")["quantization"]
    assert (quantization["int8_ops"], quantization["float_ops"]) == ({"Conv": 3}, {"Conv": 1, "Linear": 1})
    with pytest.raises(SpecError, match=r"skip: 'haed' matches no layer; did you mean 'head'\?"):
        static(exact, tmp_path / "int8", calibration=[images], skip=["haed"])


def test_fewer_bits_make_a_smaller_file_without_any_data(tmp_path, exact, images):
    """There are no 4 bits for convolutions that are one for each channel."""
    dynamic(exact, tmp_path / "dynamic")
    for bits in (8, 4):
        weight_only(exact, tmp_path / f"{bits}", bits=bits)
    for name, off_by, in_float in (("dynamic", 0.002, {}), ("8", 0.002, {}), ("4", 0.03, {"Conv": 2})):
        assert compare_outputs(load_model(exact), load_model(tmp_path / name), images)["mean_abs_diff"] < off_by
        assert read_record(tmp_path / name)["quantization"]["float_ops"] == in_float
    assert size_mb(tmp_path / "4") < 0.8 * size_mb(tmp_path / "8") < 0.4 * size_mb(exact)


def test_attention_that_reads_tokens_is_quantized_layer_by_layer(tmp_path, nets):
    tokens = torch.randint(50, (8, 7))
    save_program(nets.Transformer(), tmp_path / "float", example=tokens, format="tflite")
    inside = [f"encoder.{number}.{name}" for number in (0, 1) for name in ("self_attn", "linear1", "linear2")]
    assert layers_of(tmp_path / "float") == [*inside, "head"]
    static(tmp_path / "float", tmp_path / "int8", calibration=[tokens], skip=["encoder.1.*"])
    quantization = read_record(tmp_path / "int8")["quantization"]
    assert (quantization["int8_ops"], quantization["float_ops"]) == ({"Linear": 5}, {"Linear": 4})
    exact, small = load_model(tmp_path / "float"), load_model(tmp_path / "int8")
    assert 0 < compare_outputs(exact, small, tokens)["mean_abs_diff"] < 0.02
