import gc

import pytest
import torch

from heliostat.compression.export import save_onnx
from heliostat.compression.formats import load_model, save_torch
from heliostat.compression.measure import compare_outputs, latency, measure_speed, num_params, size_mb
from heliostat.compression.verdict import why_not_faster


@pytest.fixture
def linear(tmp_path):
    model = torch.nn.Linear(6, 4)
    arguments = {"in_features": 6, "out_features": 4}
    save_torch(model, tmp_path / "torch", reference="torch.nn:Linear", model_args=arguments, example=torch.zeros(1, 6))
    save_onnx(model, tmp_path / "onnx", example=torch.randn(2, 6))
    return model, tmp_path


def test_parameters_are_counted_alike_in_every_format(linear):
    model, folder = linear
    assert num_params(model) == num_params(folder / "torch") == num_params(folder / "onnx") == 28


def test_size_counts_what_is_deployed(linear):
    _, folder = linear
    (folder / "torch" / "code").mkdir()
    (folder / "torch" / "code" / "big.py").write_bytes(b"#" * 10**6)
    assert size_mb(folder / "torch") == (folder / "torch" / "weights.pt").stat().st_size / 1e6


def test_models_are_timed_in_turns_and_each_often_enough():
    calls = []
    models = {name: lambda batch, name=name: calls.append(name) for name in ("a", "b")}
    figures = latency(models, torch.zeros(1), min_seconds=0.03)
    assert [name for name, before in zip(calls, [None, *calls]) if name != before][:4] == ["a", "b", "a", "b"]
    for timed in figures.values():
        assert timed["runs"] >= 20
        assert 0 < timed["p50_ms"] <= timed["p95_ms"]


def test_timing_leaves_threads_garbage_collector_and_mode_as_they_were():
    model = torch.nn.Dropout().train()
    seen = []
    model.register_forward_hook(
        lambda *_: seen.append(
            (torch.get_num_threads(), gc.isenabled(), model.training, torch.is_inference_mode_enabled())
        )
    )
    torch.set_num_threads(2)
    latency({"model": model}, torch.zeros(1, 2), min_seconds=0.0)
    assert set(seen) == {(1, False, False, True)}
    assert (torch.get_num_threads(), gc.isenabled(), model.training) == (2, True, True)


def test_timing_restores_everything_when_a_model_fails():
    torch.set_num_threads(2)
    with pytest.raises(ZeroDivisionError):
        latency({"model": lambda batch: 1 / 0}, torch.zeros(1))
    assert (torch.get_num_threads(), gc.isenabled()) == (2, True)


def test_speed_has_the_names_that_files_rely_on(linear):
    model, folder = linear
    figures = measure_speed(load_model(folder / "onnx"), example=torch.randn(3, 6), baseline=model, min_seconds=0.01)
    assert set(figures) == {
        "latency_ms",
        "latency_ms_p95",
        "latency_ms_b32",
        "latency_ms_b32_p95",
        "throughput_per_s",
        "speedup",
        "speedup_b32",
    }
    assert figures["throughput_per_s"] == pytest.approx(32e3 / figures["latency_ms_b32"])


def test_a_batch_is_made_of_the_example_whatever_its_size():
    sizes = []
    measure_speed(lambda batch: sizes.append(len(batch)), example=torch.zeros(5, 2), batches=(1, 12), min_seconds=0.0)
    assert set(sizes) == {1, 12}


def test_outputs_are_compared_over_all_rows():
    inputs = torch.tensor([[1.0, 2.0], [3.0, 1.0], [0.0, 5.0], [2.0, 2.5]])
    swap_the_last = inputs.clone()
    swap_the_last[3] = torch.tensor([2.5, 2.0])
    figures = compare_outputs(
        lambda x: x, lambda x: swap_the_last[[int((inputs == r).all(1).nonzero()) for r in x]], inputs, batch_size=3
    )
    assert figures == {"max_abs_diff": 0.5, "mean_abs_diff": 0.125, "argmax_agreement": 0.75}
    assert "argmax_agreement" not in compare_outputs(lambda x: x[:, 0], lambda x: x[:, 1], inputs)


def test_a_faster_model_needs_no_excuse():
    assert why_not_faster(2.0, method="magnitude", facts={}, latency_ms=1.0) is None


@pytest.mark.parametrize(
    ("method", "facts", "latency_ms", "text"),
    [
        ("magnitude", {}, 1.0, "no dense kernel skips them"),
        ("dynamic", {"int8_ops": {"Conv": 3}, "float_ops": {}}, 1.0, "3 convolutions run as ConvInteger"),
        ("dynamic", {"int8_ops": {"MatMul": 1}, "float_ops": {"GRU": 2}}, 1.0, "2 GRU stayed in float"),
        ("static", {"int8_ops": {"Gemm": 1}, "float_ops": {"LSTM": 1}}, 1.0, "1 LSTM stayed in float"),
        ("structured", {"params_ratio": 0.95}, 1.0, "still has 95% of the parameters"),
        ("distill", {"params_ratio": 0.2}, 0.02, "try a larger batch"),
    ],
)
def test_a_model_that_is_not_faster_says_why(method, facts, latency_ms, text):
    assert text in why_not_faster(0.9, method=method, facts=facts, latency_ms=latency_ms)
