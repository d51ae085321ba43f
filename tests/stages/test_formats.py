"""Files of several formats, in float and in int8: each goes through every gate, and `select` takes them all."""

from dataclasses import replace
from importlib.util import find_spec

import pytest

from heliostat.compression.formats import load_model
from heliostat.core.imports import resolve
from heliostat.stages.measure import Subject, call_example, measure_quality, measure_speeds


@pytest.fixture
def exported(bench, trained):
    """The trained model as a graph of torch."""
    return replace(bench, store=bench.store / "pt2").run("export", {"format": "pt2"}, model=trained)


@pytest.fixture
def measured(bench):
    """A function that gives artifacts the metrics that a run gives them."""

    def measure(*models):
        subjects = [Subject(model.folder, model.record.params, "static") for model in models]
        for model, speed in zip(models, measure_speeds(subjects, bench.task)):
            quality = measure_quality(model.folder, bench.task, model.record.params)
            yield replace(model, record=replace(model.record, metrics={**quality, **speed.metrics}))

    return measure


def test_torchao_quantizes_a_graph_as_it_is_and_select_takes_it_like_any_other(bench, trained, exported, measured):
    config = {"backend": "torchao", "calibration_samples": 100, "skip": ["4"]}
    small = bench.run("quantize", config, model=exported)
    assert set(small.record.files) == {"model.json", "model.pt2"}
    quantization = small.record.details["quantization"]
    assert (quantization["backend"], quantization["int8_ops"]) == ("torchao", {"Linear": 2})
    assert (quantization["calibration_rows"], quantization["reduce_range"]) == (100, True)
    assert 0 < small.record.details["parity"]["source"]["max_abs_diff"] < 2
    base, graph, int8 = measured(trained, exported, small)
    assert int8.metrics["val_accuracy"] > base.metrics["val_accuracy"] - 0.05
    assert int8.metrics["num_macs"] == base.metrics["num_macs"]
    best = bench.run("select", {"minimize": ["latency_ms"]}, baseline=base, candidates=[graph, int8])
    latencies = {row["model"]: row["metrics"]["latency_ms"] for row in best.record.details["table"]}
    assert latencies.keys() == {"train", "export", "quantize"}
    assert best.record.details["chosen"] == min(latencies, key=latencies.__getitem__)
    assert load_model(best.folder)(resolve("toy:build_data")()["val"].tensors[0]).shape == (100, 3)


def test_a_graph_learns_under_rounding_and_keeps_the_layers_in_float_that_cost_too_much(bench, trained):
    config = {"backend": "torchao", "method": "qat", "finetune_epochs": 1, "max_drop": {"val_accuracy": 0.5}}
    aware = bench.run("quantize", config, model=trained)
    assert len(aware.record.details["history"]) == 1
    assert aware.record.details["quantization"]["int8_ops"] == {"Linear": 3}
    assert aware.record.details["mixed_precision"]["left_in_float"] == []


@pytest.mark.parametrize(("backend", "package"), [("executorch", "executorch"), ("litert", "litert_torch")])
def test_a_model_learns_under_rounding_and_becomes_a_file_for_a_device(bench, trained, measured, backend, package):
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    aware = bench.run("quantize", {"backend": backend, "method": "qat", "finetune_epochs": 1}, model=trained)
    assert len(aware.record.details["history"]) == 1
    quantization = aware.record.details["quantization"]
    assert (quantization["backend"], quantization["int8_ops"]) == (backend, {"Linear": 3})
    base, int8 = measured(trained, aware)
    assert int8.metrics["val_accuracy"] > base.metrics["val_accuracy"] - 0.05
    assert int8.metrics["size_mb"] > 0
    assert load_model(aware.folder)(resolve("toy:build_data")()["val"].tensors[0]).shape == (100, 3)


def test_how_a_model_is_called_is_told_by_two_inputs_and_their_outputs(bench, trained):
    inputs, outputs = call_example(trained.folder, bench.task, trained.record.params)
    assert (inputs.shape, outputs.shape, outputs.dtype) == ((2, 8), (2, 3), "float32")
