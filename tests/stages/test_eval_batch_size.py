"""No stage computes more samples at once, without gradients, than `eval_batch_size`, or the batch size."""

from dataclasses import replace

import pytest

from heliostat.compression.formats import load_model
from heliostat.core.artifact import write_record
from heliostat.core.imports import use_root
from heliostat.core.load import load_pipeline
from heliostat.core.plan import artifact_of, plan_pipeline
from heliostat.stages.measure import measure_quality
from heliostat.training.config import CPU_ROWS, TrainConfig
from heliostat.training.evaluation import evaluate
from heliostat.training.task import build_data, build_objective

LIMITED = """

class Limited(nn.Sequential):
    \"\"\"Refuses more than five rows but in training.\"\"\"

    def forward(self, inputs):
        watched = not (self.training or torch.jit.is_tracing() or torch.compiler.is_compiling())
        if watched and len(inputs) > 5:
            raise RuntimeError(f"{len(inputs)} rows at once")
        return super().forward(inputs)


def build_model(width=16, bias=True):
    return Limited(nn.Linear(8, width, bias=bias), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))
"""
SMALL = TrainConfig(epochs=1, batch_size=16, eval_batch_size=5, steps_per_epoch=4)


@pytest.fixture
def limited(bench, toy):
    toy.module.write_text(toy.module.read_text() + LIMITED)
    use_root(toy.folder)
    return bench


def test_every_stage_keeps_to_the_eval_batch_size(limited):
    trained = limited.train(SMALL)
    sensitivity = {"levels": [0.5], "max_drop": {"val_accuracy": 1.0}}
    made = [
        limited.run("prune", {"finetune_epochs": 1, "importance": "taylor"}, model=trained),
        limited.run("prune", {"sensitivity": sensitivity}, model=trained),
        limited.run("factorize", {"rank": 2}, model=trained),
        limited.run("distill", {**SMALL.model_dump(exclude_unset=True), "model_args": {"width": 8}}, teacher=trained),
        limited.run("export", model=trained),
        limited.run("export", {"format": "pt2"}, model=trained),
        limited.run("quantize", {"calibration_samples": 50}, model=trained),
        limited.run("quantize", {"method": "qat", "finetune_epochs": 1}, model=trained),
    ]
    for artifact in [trained, *made]:
        assert "val_accuracy" in measure_quality(artifact.folder, limited.task, artifact.record.params)


def test_accuracy_does_not_depend_on_the_eval_batch_size(bench, trained):
    data, objective = build_data(bench.task, {}), build_objective(bench.task)
    model = load_model(trained.folder)
    figures = [evaluate(model, data["val"], objective, split="val", batch_size=size) for size in (1, 7, 100)]
    assert len({row["val_accuracy"] for row in figures}) == 1
    assert figures[0]["val_loss"] == pytest.approx(figures[2]["val_loss"], rel=1e-5)


def test_it_is_the_batch_size_in_its_parts_by_default_and_on_cpu_no_more_than_is_fast():
    assert TrainConfig(batch_size=32).rows_at_once() == 32
    assert TrainConfig(batch_size=32, accumulate_steps=5).rows_at_once() == 7
    assert TrainConfig(batch_size=1024).rows_at_once() == CPU_ROWS
    assert TrainConfig(batch_size=1024).rows_at_once(on_cpu=False) == 1024
    assert TrainConfig(batch_size=8, eval_batch_size=500).rows_at_once() == 500


def test_it_is_no_part_of_identity_and_the_value_in_the_file_holds_for_models_that_are_there(bench, toy):
    def planned(size=None):
        document = toy.document
        for stage in document["stages"]:
            settings = stage["config"]["train"] if stage["uses"] == "tune" else stage.get("config", {})
            if size and stage["uses"] in ("tune", "train", "distill"):
                settings["eval_batch_size"] = size
        return {node.name: node for node in plan_pipeline(load_pipeline(toy.write(document))).nodes}

    before, after = planned(), planned(5)
    assert {name: node.fingerprint for name, node in after.items()} == {n: b.fingerprint for n, b in before.items()}
    for name in ("train", "prune[sparsity=0.25]"):
        folder = before[name].folder
        folder.mkdir(parents=True)
        write_record(folder, replace(bench.keep("any").record, params={"train": {"epochs": 3, "eval_batch_size": 9}}))
        assert artifact_of(after[name]).record.params["train"] == {"epochs": 3, "eval_batch_size": 5}
        assert artifact_of(before[name]).record.params["train"] == {"epochs": 3}
