import gc

import pytest
import torch

from heliostat.compression.export import save_onnx
from heliostat.compression.formats import load_model, save_torch
from heliostat.compression.measure import compare_outputs, measure_speed, peak_memory_mb
from heliostat.compression.size import num_params, size_mb
from heliostat.compression.verdict import why_not_faster

ONNX = {"backend": "onnxruntime"}


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
    models = {name: (lambda batch, name=name: calls.append((name, len(batch))), torch.zeros(1, 2)) for name in "ab"}
    figures = measure_speed(models, min_seconds=0.03)
    turns = [call for call, before in zip(calls, [None, *calls]) if call != before]
    assert turns[:4] == [("a", 1), ("b", 1), ("a", 32), ("b", 32)]
    assert min(sum(called == name for called, _ in calls) for name in "ab") >= 50
    for speed in figures.values():
        assert 0 < speed["latency_ms"] <= speed["latency_ms_p95"]


def test_timing_leaves_threads_garbage_collector_and_mode_as_they_were():
    model = torch.nn.Dropout().train()
    seen = []
    model.register_forward_hook(
        lambda *_: seen.append(
            (torch.get_num_threads(), gc.isenabled(), model.training, torch.is_inference_mode_enabled())
        )
    )
    torch.set_num_threads(2)
    measure_speed({"model": (model, torch.zeros(1, 2))}, min_seconds=0.0)
    assert set(seen) == {(1, False, False, True)}
    assert (torch.get_num_threads(), gc.isenabled(), model.training) == (2, True, True)


def test_timing_restores_everything_when_a_model_fails():
    torch.set_num_threads(2)
    with pytest.raises(ZeroDivisionError):
        measure_speed({"model": (lambda batch: 1 / 0, torch.zeros(1))})
    assert (torch.get_num_threads(), gc.isenabled()) == (2, True)


def test_speed_has_the_names_that_files_rely_on(linear):
    model, folder = linear
    rows = torch.randn(3, 6)
    models = {"onnx": (load_model(folder / "onnx"), rows), "eager": (model, rows)}
    figures = measure_speed(models, min_seconds=0.01)
    names = {f"latency_ms{size}{part}" for size in ("", "_b32") for part in ("", "_p95", "_p99")} | {"throughput_per_s"}
    assert {name: set(speed) for name, speed in figures.items()} == {"onnx": names, "eager": names}
    assert figures["onnx"]["throughput_per_s"] == pytest.approx(32e3 / figures["onnx"]["latency_ms_b32"])


def test_a_batch_is_made_of_the_models_own_rows_whatever_its_size():
    sizes = []
    models = {width: (lambda batch: sizes.append(batch.shape), torch.zeros(5, width)) for width in (2, 3)}
    measure_speed(models, batches=(1, 12), min_seconds=0.0)
    assert set(sizes) == {(1, 2), (12, 2), (1, 3), (12, 3)}


def test_outputs_are_compared_over_all_rows():
    inputs = torch.tensor([[1.0, 2.0], [3.0, 1.0], [0.0, 5.0], [2.0, 2.5]])
    swap_the_last = inputs.clone()
    swap_the_last[3] = torch.tensor([2.5, 2.0])
    figures = compare_outputs(
        lambda x: x, lambda x: swap_the_last[[int((inputs == r).all(1).nonzero()) for r in x]], inputs, batch_size=3
    )
    assert figures == {"max_abs_diff": 0.5, "mean_abs_diff": 0.125, "argmax_agreement": 0.75}
    assert "argmax_agreement" not in compare_outputs(lambda x: x[:, 0], lambda x: x[:, 1], inputs)


def test_peak_memory_is_what_loading_and_running_a_model_adds():
    def load():
        weights = torch.ones(1000, 25_000)  # 100 MB

        def run(batch):
            return (weights * 2)[0]  # and as many again

        return run

    assert 195 < peak_memory_mb(load, torch.zeros(1)) < 230
    assert peak_memory_mb(lambda: lambda batch: batch, torch.zeros(1)) < 10


def test_a_faster_model_needs_no_excuse():
    assert why_not_faster(2.0, method="magnitude", facts={}, latency_ms=1.0) is None


@pytest.mark.parametrize(
    ("method", "facts", "latency_ms", "text"),
    [
        ("magnitude", {}, 1.0, "no dense kernel skips them"),
        ("dynamic", {**ONNX, "int8_ops": {"Conv": 3}, "float_ops": {}}, 1.0, "3 convolutions run as ConvInteger"),
        ("dynamic", {**ONNX, "int8_ops": {"MatMul": 1}, "float_ops": {"GRU": 2}}, 1.0, "2 GRU stayed in float"),
        ("static", {**ONNX, "int8_ops": {"Gemm": 1}, "float_ops": {"LSTM": 1}}, 1.0, "1 LSTM stayed in float"),
        ("static", {"backend": "torchao"}, 1.0, "torch runs the graph as it is written"),
        ("structured", {"params_ratio": 0.95}, 1.0, "still has 95% of the parameters"),
        ("distill", {"params_ratio": 0.2}, 0.02, "try a larger batch"),
    ],
)
def test_a_model_that_is_not_faster_says_why(method, facts, latency_ms, text):
    assert text in why_not_faster(0.9, method=method, facts=facts, latency_ms=latency_ms)
