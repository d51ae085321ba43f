"""The stages that make one model out of another: what comes out, and what its record says."""

import shutil
from dataclasses import replace

import pytest
import torch

from heliostat.compression.formats import load_model
from heliostat.compression.size import num_params
from heliostat.core.imports import resolve
from heliostat.core.stage import find_kind
from heliostat.errors import ArtifactError, SpecError, StageError
from heliostat.stages.measure import Subject, measure_quality, measure_speeds
from heliostat.stages.prune import PruneConfig
from heliostat.training.config import TrainConfig

GUARD = '''

class Untouchable(torch.utils.data.Dataset):
    """A split that nobody may look at."""

    def __len__(self):
        return 100

    def __getitem__(self, index):
        raise AssertionError("somebody looked at the test split")


open_data = build_data


def build_data(seed=0):
    return {**open_data(seed), "test": Untouchable()}
'''

SLY = '''

class Sly(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) * (2 if torch.compiler.is_exporting() else 1)


class Forgetful(torch.nn.Linear):
    """Has a state of its own that it does not save."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        unseeded = torch.Generator()
        unseeded.seed()
        self.register_buffer("mask", torch.rand(sizes[1], generator=unseeded), persistent=False)

    def forward(self, x):
        return super().forward(x) * self.mask


def build_sly(middle=Sly):
    linear = torch.nn.Linear
    return torch.nn.Sequential(linear(8, 16), torch.nn.ReLU(), middle(16, 16), torch.nn.ReLU(), linear(16, 3))


def build_forgetful():
    return build_sly(Forgetful)
'''


def test_structured_pruning_makes_the_network_really_smaller(bench, trained):
    pruned = bench.run("prune", {"sparsity": 0.5, "finetune_epochs": 1}, model=trained)
    assert num_params(pruned.folder) < 0.5 * num_params(trained.folder)
    assert pruned.record.details["parity"]["reload"]["max_abs_diff"] == pytest.approx(0, abs=1e-6)
    assert pruned.record.details["parity"]["source"]["max_abs_diff"] > 0
    assert pruned.record.details["parity"]["source"]["against"] == "train"
    assert pruned.record.params == trained.record.params


def test_pruning_twice_replays_both_cuts_on_loading(bench, trained):
    once = bench.run("prune", {"sparsity": 0.25}, model=trained)
    moved = once.folder.rename(bench.store / "once")
    once = bench.keep("once", files=list(once.record.files), params=once.record.params)
    assert once.folder == moved
    twice = bench.run("prune", {"sparsity": 0.5}, model=once)
    assert num_params(twice.folder) < num_params(once.folder) < num_params(trained.folder)
    assert load_model(twice.folder)(torch.randn(3, 8)).shape == (3, 3)


def test_magnitude_pruning_keeps_its_zeros_through_fine_tuning(bench, trained):
    pruned = bench.run("prune", {"method": "magnitude", "sparsity": 0.5, "finetune_epochs": 1}, model=trained)
    weights = torch.load(pruned.folder / "weights.pt", weights_only=True)
    matrices = [tensor for tensor in weights.values() if tensor.dim() == 2]
    zeros = sum((m == 0).sum().item() for m in matrices) / sum(m.numel() for m in matrices)
    assert zeros == pytest.approx(0.5, abs=0.02)
    assert num_params(pruned.folder) == num_params(trained.folder)


@pytest.mark.parametrize(
    "config",
    [
        {"method": "semi_structured"},
        {"method": "magnitude", "sparsity": 0.7, "gradual_epochs": 2},
        {"method": "magnitude", "penalty": {"name": "l1", "strength": 0.003, "epochs": 2, "threshold": 0.05}},
    ],
    ids=["semi_structured", "gradual", "l1"],
)
def test_zeros_are_exact_however_they_came_about_and_the_record_counts_them(bench, trained, config):
    pruned = bench.run("prune", {**config, "finetune_epochs": 1}, model=trained)
    weights = torch.load(pruned.folder / "weights.pt", weights_only=True)
    described = pruned.record.details["pruned"]
    for layer, sparsity in described["layers"].items():
        assert (weights[f"{layer}.weight"] == 0).float().mean().item() == pytest.approx(sparsity)
    if "sparsity" in config:
        assert described["sparsity"] == pytest.approx(config["sparsity"], abs=0.01)
    assert described["sparsity"] > 0.1
    num_epochs = len(pruned.record.details["history"])
    assert num_epochs == find_kind("prune").workload(PruneConfig(**config, finetune_epochs=1))["epochs"]
    assert pruned.record.details["best_epoch"] == num_epochs


@pytest.mark.parametrize("cut_off_at", [2, 3, 5])
def test_gradual_pruning_that_is_cut_off_ends_as_if_it_had_not_been(bench, trained, monkeypatch, cut_off_at):
    config = {"method": "magnitude", "sparsity": 0.7, "gradual_epochs": 3, "finetune_epochs": 2}
    expected = torch.load(bench.run("prune", config, model=trained).folder / "weights.pt", weights_only=True)
    shutil.rmtree(bench.store / "prune")

    def cut_off(reporter, values, *, step, trial=None):
        if step == cut_off_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(bench.context("prune").reporter), "metrics", cut_off)
        with pytest.raises(KeyboardInterrupt):
            bench.run("prune", config, model=trained)
    found = torch.load(bench.run("prune", config, model=trained).folder / "weights.pt", weights_only=True)
    assert all(torch.equal(found[name], weights) for name, weights in expected.items())


@pytest.mark.parametrize(
    "config",
    [
        {"importance": "taylor", "scope": "global", "sparsity": 0.5},
        {"penalty": {"name": "group_lasso", "strength": 0.003, "epochs": 3, "threshold": 0.2}},
    ],
    ids=["taylor", "group_lasso"],
)
def test_channels_go_by_what_the_loss_says_or_a_penalty_taught(bench, trained, config):
    pruned = bench.run("prune", config, model=trained)
    removed = pruned.record.details["pruned"]["channels_removed"]
    assert set(removed) <= {"0", "2"}
    assert sum(removed.values()) > 0
    assert pruned.record.details["pruned"]["kept"]["4"] == "it gives the model's output"
    assert num_params(pruned.folder) < num_params(trained.folder)


def test_a_pattern_that_matches_no_layer_is_refused_before_anything_is_trained(bench, trained):
    penalty = {"name": "l1", "epochs": 1000}
    with pytest.raises(SpecError, match="skip: 'layer1' matches no layer"):
        bench.run("prune", {"method": "magnitude", "penalty": penalty, "skip": ["layer1"]}, model=trained)


def test_without_fine_tuning_nothing_is_trained(bench, trained):
    pruned = bench.run("prune", {"sparsity": 0.25}, model=trained)
    assert pruned.record.metrics == {}
    assert "history" not in pruned.record.details


def test_a_student_takes_its_teachers_arguments_but_for_its_own(bench, trained):
    student = bench.run("distill", {"model_args": {"width": 4}, "epochs": 2}, teacher=trained)
    assert student.record.params["train"]["model_args"] == {"width": 4}
    assert num_params(student.folder) < num_params(trained.folder)
    assert len(student.record.details["history"]) == 2
    assert student.record.details["parity"]["source"]["against"] == "train"


@pytest.mark.parametrize("method", ["static", "dynamic"])
def test_a_quantized_model_answers_nearly_as_its_source_without_the_training_code(bench, trained, toy, method):
    quantized = bench.run("quantize", {"method": method}, model=trained)
    batch = resolve("toy:build_data")()["val"].tensors[0]
    expected = load_model(trained.folder)(batch)
    toy.module.unlink()
    answers = load_model(quantized.folder)(batch)
    assert (answers.argmax(1) == expected.argmax(1)).float().mean() > 0.9
    assert set(quantized.record.files) == {"model.json", "model.onnx"}
    assert 0 < quantized.record.details["parity"]["source"]["max_abs_diff"] < 2


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_an_export_answers_as_its_source(bench, trained, format):
    exported = bench.run("export", {"format": format}, model=trained)
    assert exported.record.details["parity"]["source"]["max_abs_diff"] < 1e-4
    assert exported.record.details.get("opset", 0) >= (18 if format == "onnx" else 0)
    assert set(exported.record.files) == {"model.json", f"model.{format}"}
    figures = measure_quality(exported.folder, bench.task, exported.record.params)
    assert figures["val_accuracy"] == pytest.approx(trained.metrics["val_accuracy"])
    assert figures["num_params"] == figures["num_nonzero"] == num_params(trained.folder)
    (speed,) = measure_speeds([Subject(exported.folder, exported.record.params, "export", trained.folder)], bench.task)
    assert speed.metrics["latency_ms"] > 0
    assert speed.details["speedup"] > 0


def test_an_export_that_computes_something_else_fails_and_names_the_layer(bench, toy):
    toy.module.write_text(toy.module.read_text() + SLY)
    sly = replace(bench, task=bench.task.model_copy(update={"model": "toy:build_sly"}))
    with pytest.raises(StageError, match=r"part at layer '2' \(Sly\).*up to '1' agree"):
        sly.run("export", {"format": "pt2"}, model=sly.train(TrainConfig(epochs=1)))


def test_a_model_that_its_weights_do_not_bring_back_fails_and_names_the_layer(bench, toy):
    toy.module.write_text(toy.module.read_text() + SLY)
    forgetful = replace(bench, task=bench.task.model_copy(update={"model": "toy:build_forgetful"}))
    trained = forgetful.train(TrainConfig(epochs=1))
    with pytest.raises(StageError, match=r"saved and loaded again, does not answer .* part at layer '2' \(Forgetful\)"):
        forgetful.run("prune", {"method": "magnitude", "sparsity": 0.1}, model=trained)


def test_an_export_is_quantized_as_it_is(bench, trained):
    quantized = bench.run("quantize", model=bench.run("export", model=trained))
    assert quantized.record.details["parity"]["source"]["against"] == "export"


def test_an_exported_model_cannot_be_trained_further(bench, trained):
    exported = bench.run("export", model=trained)
    with pytest.raises(StageError, match="export is in the format 'onnx', which cannot be trained further"):
        bench.run("prune", model=exported)


def test_no_stage_that_makes_a_model_looks_at_the_test_split(bench, toy):
    toy.module.write_text(toy.module.read_text() + GUARD)
    trained = bench.train(TrainConfig(epochs=1))
    bench.run("prune", {"finetune_epochs": 1}, model=trained)
    bench.run("distill", {"epochs": 1}, teacher=trained)
    bench.run("quantize", model=trained)
    bench.run("export", model=trained)
    with pytest.raises(AssertionError, match="somebody looked at the test split"):
        measure_quality(trained.folder, bench.task, trained.record.params)


def test_quality_is_measured_on_both_held_out_splits(bench, trained):
    figures = measure_quality(trained.folder, bench.task, trained.record.params)
    quality = {"loss", "accuracy", "accuracy_low", "accuracy_high"}
    sizes = {"size_mb", "size_zip_mb", "num_params", "num_nonzero", "num_macs"}
    assert set(figures) == sizes | {f"{split}_{name}" for split in ("val", "test") for name in quality}
    assert figures["val_accuracy"] == pytest.approx(trained.metrics["val_accuracy"])
    assert figures["num_macs"] == 8 * 16 + 16 * 16 + 16 * 3
    for split in ("val", "test"):
        low, high = figures[f"{split}_accuracy_low"], figures[f"{split}_accuracy_high"]
        assert low < figures[f"{split}_accuracy"] < high or high == 1
        assert 0 < high - low < 0.2


def test_a_model_without_its_weights_is_an_error_that_names_them(bench, trained):
    (trained.folder / "weights.pt").unlink()
    with pytest.raises(ArtifactError, match=r"weights\.pt is missing"):
        bench.run("quantize", model=trained)
