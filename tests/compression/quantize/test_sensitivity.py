"""Mixed precision: which layers stay in float."""

import pytest
import torch

from heliostat.compression.export import save_onnx
from heliostat.compression.formats import load_model
from heliostat.compression.measure import compare_outputs
from heliostat.compression.quantize.post_training import layers_of, static
from heliostat.compression.quantize.sensitivity import mix_precision
from heliostat.errors import StageError

COSTS = {"a": 0.01, "b": 0.05, "c": 0.002}


def _drops(mixes):
    return [{"val_accuracy": sum(cost for layer, cost in COSTS.items() if layer not in left)} for left in mixes]


def test_nothing_stays_in_float_that_need_not_and_then_nothing_is_scanned():
    mix = mix_precision(list(COSTS), _drops, max_drop={"val_accuracy": 0.1})
    assert (mix.left_in_float, mix.alone) == ((), {})


def test_the_worst_layers_stay_in_float_until_the_drop_is_within_the_limit():
    mix = mix_precision(list(COSTS), _drops, max_drop={"val_accuracy": 0.02})
    assert mix.left_in_float == ("b",)
    assert mix.drops["val_accuracy"] == pytest.approx(0.012)
    assert {layer: drops["val_accuracy"] for layer, drops in mix.alone.items()} == pytest.approx(COSTS)
    assert mix_precision(list(COSTS), _drops, max_drop={"val_accuracy": 0.005}).left_in_float == ("b", "a")


def test_a_limit_that_no_mix_keeps_is_an_error_with_the_drop():
    with pytest.raises(StageError, match=r"val_accuracy 0\.001"):
        mix_precision(list(COSTS), _drops, max_drop={"val_accuracy": 0.001})


def test_a_layer_whose_weights_int8_cannot_tell_apart_is_found(tmp_path, nets):
    model, inputs = nets.mlp(), torch.randn(64, 6)
    inputs[:, 0] = 0
    model[0].weight.data[:, 0] *= 1000  # idle, but with one scale for all of the layer the others are less than a step
    save_onnx(model, tmp_path / "float", example=inputs)
    exact = load_model(tmp_path / "float")

    def drop_with(left_in_float):
        static(exact_folder, tmp_path / "int8", calibration=[inputs], per_channel=False, skip=left_in_float)
        return {"val_error": compare_outputs(load_model(tmp_path / "int8"), exact, inputs)["mean_abs_diff"]}

    exact_folder = tmp_path / "float"
    layers = layers_of(exact_folder)
    mix = mix_precision(layers, lambda mixes: list(map(drop_with, mixes)), max_drop={"val_error": 0.05})
    assert mix.left_in_float == (layers[0],)
    assert drop_with([])["val_error"] > 0.1
