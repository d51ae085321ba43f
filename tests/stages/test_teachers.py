"""What students learn from their teachers on tasks of all kinds, without Ray."""

from dataclasses import replace

import pytest

from heliostat.compression.formats import load_model
from heliostat.core.spec import Task
from heliostat.core.stage import find_kind
from heliostat.errors import StageError
from heliostat.stages.passes.nas import search_architecture
from heliostat.stages.passes.workshop import Workshop
from heliostat.training.config import TrainConfig
from heliostat.training.task import build_data

MODULE = '''
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

OUTPUTS = {"column": 1, "row": 1, "double": 1, "yes_or_no": 1, "many_labels": 20, "tokens": 5, "pixels": 2}


class WithMore(Dataset):
    """The third item of a sample is where it was taken, which nothing uses."""

    def __init__(self, rows):
        self.rows, self.places = rows, torch.randn(len(rows), 2) * 10

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return *self.rows[index], self.places[index]


class Shifted(TensorDataset):
    """Its samples are computed from the tensors."""

    def __getitem__(self, index):
        inputs, targets = super().__getitem__(index)
        return inputs + 100, targets


def rows(count, seed, kind):
    generator = torch.Generator().manual_seed(seed)
    if kind == "tokens":
        inputs = torch.randint(5, (count, 6), generator=generator)
        targets = (inputs + inputs.roll(1, 1)) % 5
        return TensorDataset(inputs, targets.masked_fill(inputs == 4, -100))
    if kind == "pixels":
        inputs = torch.randn(count, 1, 6, 6, generator=generator)
        return TensorDataset(inputs, (inputs[:, 0] > 0.3).long())
    inputs = torch.randn(count, 8, generator=generator)
    wanted = inputs[:, :1] * 2 + inputs[:, 1:2] * inputs[:, 2:3] + 1
    targets = {
        "column": wanted,
        "row": wanted[:, 0],
        "double": wanted.double(),
        "yes_or_no": (wanted > 1).float(),
        "many_labels": (inputs @ torch.randn(8, 20, generator=torch.Generator().manual_seed(5)) > 0).float(),
        "classes": (wanted[:, 0] + 5).clamp(0, 9).long(),
    }
    found = TensorDataset(inputs, targets[kind.removesuffix("_and_more").removesuffix("_shifted")])
    if kind.endswith("_shifted"):
        return Shifted(*found.tensors)
    return WithMore(found) if kind.endswith("_and_more") else found


def build_data(kind):
    return {"train": rows(400, 0, kind), "val": rows(200, 1, kind)}


class Squeeze(nn.Module):
    def forward(self, outputs):
        return outputs.squeeze(-1)


def build_model(kind, width=48, out=None):
    out = out or OUTPUTS.get(kind, 10)
    if kind == "tokens":
        layers = [nn.Embedding(5, width), nn.Flatten(), nn.Linear(6 * width, 6 * out), nn.Unflatten(1, (6, out))]
        return nn.Sequential(*layers)
    if kind == "pixels":
        return nn.Sequential(nn.Conv2d(1, width, 1), nn.ReLU(), nn.Conv2d(width, out, 1))
    layers = [nn.Linear(8, width), nn.ReLU(), nn.Linear(width, out)]
    return nn.Sequential(*layers, *([Squeeze()] if kind == "row" else []))


def loss(outputs, targets):
    if targets.ndim == 2 and not targets.is_floating_point():
        return functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())
    if not targets.is_floating_point():
        return functional.cross_entropy(outputs, targets)
    if ((targets == 0) | (targets == 1)).all():
        return functional.binary_cross_entropy_with_logits(outputs, targets)
    return functional.mse_loss(outputs, targets)
'''

SETTINGS = {"epochs": 4, "batch_size": 32, "optimizer": {"lr": 0.02}}


@pytest.fixture
def tasks(bench):
    """The bench with a task of many kinds, and a trained teacher of one."""
    (bench.root / "tasks.py").write_text(MODULE)
    bench = replace(bench, task=Task(model="tasks:build_model", data="tasks:build_data", loss="tasks:loss"))

    def teacher(kind, **model_args):
        args = {"kind": kind.removesuffix("_and_more").removesuffix("_shifted"), **model_args}
        return bench.train(TrainConfig(**SETTINGS, model_args=args, data_args={"kind": kind}))

    return bench, teacher


def _off_by(bench, student, teacher, kind):
    """How far the outputs are from the teacher's, as a part of how far those are from their own mean."""
    inputs = build_data(bench.task, {"kind": kind})["val"].tensors[0]
    outputs, expected = load_model(student.folder)(inputs), load_model(teacher.folder)(inputs)
    if kind in ("tokens", "pixels", "classes"):
        outputs, expected = (part.softmax(2 if kind == "tokens" else 1) for part in (outputs, expected))
    return ((outputs - expected).square().mean() / (expected - expected.mean(0)).square().mean()).item()


@pytest.mark.parametrize(
    ("kind", "compared"),
    [
        ("column", "regression"),
        ("row", "regression"),
        ("double", "regression"),
        ("yes_or_no", "binary"),
        ("many_labels", "binary"),
        ("classes", "classes"),
        ("tokens", "tokens"),
        ("pixels", "dense"),
    ],
)
def test_a_student_with_all_weight_on_its_teacher_comes_near_it(tasks, kind, compared):
    bench, train = tasks
    teacher = train(kind)
    config = {**SETTINGS, "alpha": 1.0, "temperature": 1.0, "model_args": {"width": 24}}
    student = bench.run("distill", config, teacher=teacher)
    told = student.record.details["distillation"]
    assert told["loss"] == compared
    assert told["teachers"] == "train"
    assert _off_by(bench, student, teacher, kind) < 0.3


def test_a_teacher_of_no_weight_is_not_learned_from(tasks):
    bench, train = tasks
    teacher = train("column")
    alone = bench.run("distill", {**SETTINGS, "epochs": 1, "alpha": 0.0, "model_args": {"width": 8}}, teacher=teacher)
    assert alone.record.details["distillation"]["loss"] is None
    assert not list(bench.store.glob("shelf/*/outputs-*.pt"))


def test_extras_of_a_sample_are_no_answers_of_a_teacher(tasks):
    bench, train = tasks
    teacher = train("classes")
    trained = {}
    for kind in ("classes", "classes_and_more"):
        config = {**SETTINGS, "alpha": 0.9, "model_args": {"width": 8}, "data_args": {"kind": kind}}
        trained[kind] = bench.run("distill", config, teacher=teacher).record.metrics["val_loss"]
        for file in (bench.store / "distill").rglob("*.pt"):
            file.unlink()
    assert trained["classes_and_more"] == pytest.approx(trained["classes"], rel=1e-5)


def test_a_dataset_that_computes_its_samples_from_tensors_still_does(tasks):
    """Trained on the tensors themselves, about 0, the student would not fit inputs of about 100 in validation."""
    bench, train = tasks
    teacher = train("column_shifted")
    student = bench.run("distill", {**SETTINGS, "model_args": {"width": 48}, "alpha": 1.0}, teacher=teacher)
    losses = [student.record.details["history"][-1][f"{split}_loss"] for split in ("train", "val")]
    assert max(losses) < 20 * min(losses)
    assert not list(bench.store.glob("shelf/*/outputs-*.pt"))


@pytest.mark.parametrize("uses", ["prune", "quantize", "factorize"])
def test_a_model_with_one_output_is_tuned_on_what_it_said_before(tasks, uses):
    bench, train = tasks
    before = train("column", width=32)
    config = {"finetune_epochs": 3, "distillation": {"alpha": 1.0}}
    config |= {"prune": {"sparsity": 0.25}, "quantize": {"method": "qat"}, "factorize": {"rank": 4}}[uses]
    after = bench.run(uses, config, model=before)
    assert after.record.details["distillation"]["loss"] == "regression"
    losses = [row["train_loss"] for row in after.record.details["history"]]
    assert 0 < losses[-1] < losses[0]
    assert _off_by(bench, after, before, "column") < 0.3


def test_networks_with_one_output_share_weights(tasks):
    bench, _ = tasks
    config = {
        **SETTINGS,
        "model_args": {"kind": "column"},
        "data_args": {"kind": "column"},
        "elastic": {"model_args.width": [8, 32]},
        "trials": 2,
    }
    settings = find_kind("nas").config.model_validate(config)
    recipe = TrainConfig.model_validate(settings.model_dump(include=set(TrainConfig.model_fields)))
    context = bench.context("nas")
    shop = Workshop(
        task=bench.task,
        recipe=recipe,
        data=build_data(bench.task, recipe.data_args),
        seed=0,
        root=bench.root,
        folder=context.folder,
        on_epoch=lambda epoch, row: None,
    )
    found = search_architecture(shop, settings, alone=lambda function, *args: function(*args))
    assert found.details["distillation"]["loss"] == "regression"
    small = next(row for row in found.details["subnets"] if row["width"] == 8)
    assert small["val_loss"] < 2.0  # of a variance of 5


def test_a_teacher_with_other_outputs_is_refused_before_the_first_epoch(tasks):
    bench, train = tasks
    teacher = train("classes")
    config = {**SETTINGS, "model_args": {"width": 8, "out": 12}}
    with pytest.raises(StageError, match=r"student gives outputs \(64, 12\).*\(train\) \(64, 10\)"):
        bench.run("distill", config, teacher=teacher)
    assert not list((bench.store / "distill").rglob("*.pt"))


def test_the_file_may_say_how_outputs_are_compared(tasks):
    bench, train = tasks
    teacher = train("many_labels")
    student = bench.run("distill", {**SETTINGS, "epochs": 1, "loss": "regression"}, teacher=teacher)
    assert student.record.details["distillation"] == {
        "teachers": "train",
        "loss": "regression",
        "why": "loss: regression",
    }
    with pytest.raises(StageError, match=r"distillation\.loss: tokens .* is not for outputs float32 \(64, 20\)"):
        bench.run("prune", {"finetune_epochs": 1, "distillation": {"loss": "tokens"}}, model=teacher)
