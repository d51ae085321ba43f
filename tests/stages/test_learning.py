"""Stages that train on, with a teacher or with rounding: what comes out, and what the record says."""

import logging
import os
import shutil

import pytest
import torch

from heliostat.compression.formats import load_model
from heliostat.compression.size import num_params
from heliostat.core.imports import resolve
from heliostat.errors import SpecError, StageError
from heliostat.stages.measure import measure_quality
from heliostat.stages.passes import teaching
from heliostat.training.config import TrainConfig

OTHER_MODEL = """
from torch import nn


def build_other(depth=1):
    layers = [nn.Linear(8, 6), nn.Tanh()] + [layer for _ in range(depth) for layer in (nn.Linear(6, 6), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(6, 3))
"""


def _accuracy(bench, artifact):
    return measure_quality(artifact.folder, bench.task, artifact.record.params)["val_accuracy"]


def test_quantization_aware_training_ends_as_int8_that_runs_without_the_training_code(bench, trained, toy):
    aware = bench.run("quantize", {"method": "qat", "finetune_epochs": 2}, model=trained)
    details = aware.record.details
    assert len(details["history"]) == 2
    assert details["quantization"]["int8_ops"] == {"Gemm": 3}
    assert details["not_rounded"] == {}
    assert set(aware.record.files) == {"model.json", "model.onnx"}
    assert _accuracy(bench, aware) == pytest.approx(aware.record.metrics["val_accuracy"], abs=0.04)
    toy.module.unlink()
    assert load_model(aware.folder)(torch.randn(3, 8)).shape == (3, 3)


def test_layers_stay_in_float_until_validation_is_within_the_limit(bench, trained):
    config = {"max_drop": {"val_accuracy": 0.03}, "calibration_split": "val", "calibration": "percentile"}
    mixed = bench.run("quantize", config, model=trained)
    mix = mixed.record.details["mixed_precision"]
    before = _accuracy(bench, trained)
    assert before - _accuracy(bench, mixed) == pytest.approx(mix["drops"]["val_accuracy"], abs=1e-6)
    assert mix["drops"]["val_accuracy"] <= 0.03


def test_weight_only_keeps_the_weights_in_4_bits(bench, trained):
    small = bench.run("quantize", {"method": "weight_only", "bits": 4, "group_size": 16}, model=trained)
    assert small.record.details["quantization"]["int8_ops"] == {"MatMul": 3}
    assert _accuracy(bench, small) > _accuracy(bench, trained) - 0.15


@pytest.mark.parametrize("method", ["dynamic", "weight_only"])
def test_torchao_keeps_a_torch_model_and_the_record_says_what_ran(bench, trained, method):
    small = bench.run("quantize", {"method": method, "backend": "torchao", "skip": ["4"]}, model=trained)
    quantization = small.record.details["quantization"]
    assert (quantization["backend"], quantization["int8_ops"]) == ("torchao", {"Linear": 2})
    assert small.record.details["parity"]["reload"]["max_abs_diff"] == 0
    figures = measure_quality(small.folder, bench.task, small.record.params)
    assert figures["val_accuracy"] > _accuracy(bench, trained) - 0.05
    assert figures["num_macs"] == measure_quality(trained.folder, bench.task, trained.record.params)["num_macs"]


@pytest.mark.parametrize("uses", ["prune", "quantize"])
def test_fine_tuning_learns_from_the_model_as_it_came_in(bench, trained, uses):
    """All weight on the teacher: the labels cannot be learned, yet the outputs stay near."""
    config = {"finetune_epochs": 2, "distillation": {"alpha": 1.0, "temperature": 2.0}}
    config |= {"method": "qat"} if uses == "quantize" else {"method": "magnitude", "sparsity": 0.3}
    taught = bench.run(uses, config, model=trained)
    inputs = resolve("toy:build_data")()["val"].tensors[0]
    answers, expected = load_model(taught.folder)(inputs), load_model(trained.folder)(inputs)
    assert (answers.argmax(1) == expected.argmax(1)).float().mean() > 0.9
    assert taught.record.details["history"][0]["train_loss"] < 0.3


def test_several_teachers_are_an_ensemble(bench, trained):
    trained.folder.rename(bench.store / "first")
    first = bench.keep("first", files=trained.record.files, params=trained.record.params)
    other = bench.train(TrainConfig(epochs=1, model_args={"width": 12}))
    inputs = resolve("toy:build_data")()["val"].tensors[0]
    student = bench.run("distill", {"epochs": 1, "alpha": 1.0}, teacher=[first, other])
    assert student.record.details["parity"]["source"]["against"] == "first, train"
    mean = (load_model(first.folder)(inputs) + load_model(other.folder)(inputs)) / 2
    off_by = (load_model(student.folder)(inputs) - mean).abs().max().item()
    assert student.record.details["parity"]["source"]["max_abs_diff"] == pytest.approx(off_by, rel=1e-3)


def _weights(artifact):
    return torch.load(artifact.folder / "weights.pt", weights_only=True)


def _retrained(bench, trained):
    """The student's weights, trained from the start."""
    shutil.rmtree(bench.store / "distill", ignore_errors=True)
    return _weights(bench.run("distill", {"epochs": 1, "alpha": 0.5}, teacher=trained))


def test_what_a_teacher_says_is_computed_once_for_all_candidates_that_learn_from_it(bench, trained):
    alone = _retrained(bench, trained)
    (file,) = bench.store.glob("shelf/*/outputs-*.pt")
    assert len(torch.load(file, weights_only=True)) == 400
    before = file.stat()
    again = _retrained(bench, trained)
    bench.run("prune", {"finetune_epochs": 1, "distillation": {}}, model=trained)
    assert list(bench.store.glob("shelf/*/outputs-*.pt")) == [file]
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert all(torch.equal(again[name], alone[name]) for name in alone)

    # another teacher under the same name says something else
    state = {name: -tensor for name, tensor in _weights(trained).items()}
    torch.save(state, trained.folder / "weights.pt")
    _retrained(bench, trained)
    assert len(list(bench.store.glob("shelf/*/outputs-*.pt"))) == 2


@pytest.mark.parametrize("fault", ["cut short", "no shelf", "too large"])
def test_where_a_teachers_outputs_cannot_be_shared_students_learn_all_the_same(bench, trained, monkeypatch, fault):
    expected = _retrained(bench, trained)
    (file,) = bench.store.glob("shelf/*/outputs-*.pt")
    if fault == "cut short":
        os.truncate(file, file.stat().st_size // 2)
    else:
        shutil.rmtree(bench.store / "shelf")
    if fault == "no shelf":
        (bench.store / "shelf").touch()
    if fault == "too large":
        monkeypatch.setattr(teaching, "AT_MOST_MB", 0.001)
    found = _retrained(bench, trained)
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)
    if fault == "cut short":
        assert len(torch.load(file, weights_only=True)) == 400
    if fault == "too large":
        assert not list(bench.store.glob("shelf/*/outputs-*.pt"))


def test_a_student_may_be_another_model_and_is_pruned_as_that(bench, trained, toy):
    (toy.folder / "other.py").write_text(OTHER_MODEL)
    config = {"model": "other:build_other", "model_args": {"depth": 2}, "epochs": 1}
    student = bench.run("distill", config, teacher=trained)
    assert num_params(student.folder) == 9 * 6 + 2 * 7 * 6 + 7 * 3
    pruned = bench.run("prune", {"sparsity": 0.5}, model=student)
    assert num_params(pruned.folder) < num_params(student.folder)
    assert load_model(pruned.folder)(torch.randn(2, 8)).shape == (2, 3)


def test_matched_layers_learn_to_tell_samples_apart_alike(bench, trained):
    def similarity(student):
        inputs = resolve("toy:build_data")()["train"].tensors[0][:64]
        rows = [torch.relu(torch.nn.functional.linear(inputs, *weights)) for weights in (student, _first(trained))]
        one, other = (torch.nn.functional.normalize(r @ r.T, dim=1) for r in rows)
        return (one - other).square().mean().item()

    def _first(artifact):
        weights = torch.load(artifact.folder / "weights.pt", weights_only=True)
        return weights["0.weight"], weights["0.bias"]

    config = {"model_args": {"width": 6}, "epochs": 3, "optimizer": {"lr": 0.01}}
    plain = similarity(_first(bench.run("distill", config, teacher=trained)))
    matched = {**config, "features": {"1": "1"}, "feature_weight": 1000.0}
    for file in (bench.store / "distill").rglob("*.pt"):
        file.unlink()
    assert similarity(_first(bench.run("distill", matched, teacher=trained))) < 0.8 * plain


def test_layers_that_cannot_be_matched_are_refused(bench, trained):
    with pytest.raises(SpecError, match="features: the student has no layer 'first'"):
        bench.run("distill", {"features": {"first": "1"}}, teacher=trained)
    with pytest.raises(SpecError, match="features: the teacher has no layer '9'"):
        bench.run("distill", {"features": {"1": "9"}}, teacher=trained)
    with pytest.raises(StageError, match="features: layers are matched with those of one teacher, not of 2"):
        bench.run("distill", {"features": {"1": "1"}}, teacher=[trained, trained])


def test_a_student_no_smaller_than_its_teacher_is_warned_of(bench, trained, caplog):
    with caplog.at_level(logging.WARNING):
        student = bench.run("distill", {"model_args": {"width": 32}, "epochs": 1}, teacher=trained)
    assert "the student is no smaller than train" in student.record.details["warnings"][0]
    assert "the student is no smaller than train" in caplog.text


def test_a_factorized_network_has_fewer_parameters_and_loads_again(bench):
    trained = bench.train(TrainConfig(epochs=2, model_args={"width": 32}, optimizer={"lr": 0.01}))
    thin = bench.run("factorize", {"rank": 4, "finetune_epochs": 1}, model=trained)
    assert thin.record.details["factorized"]["ranks"] == {"0": 4, "2": 4}
    assert "rank 3" in thin.record.details["factorized"]["kept"]["4"]
    assert num_params(thin.folder) < 0.6 * num_params(trained.folder)
    assert thin.record.details["parity"]["reload"]["max_abs_diff"] == pytest.approx(0, abs=1e-6)
    assert _accuracy(bench, thin) == pytest.approx(thin.record.metrics["val_accuracy"])
