"""A saved model is the one that was validated, or the stage fails."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from heliostat.core.stage import Validated
from heliostat.errors import StageError
from heliostat.stages.measure import measure_quality
from heliostat.stages.models import fine_tune, save_trained
from heliostat.stages.train import _check_own
from heliostat.training.config import TrainConfig
from heliostat.training.run import run_training
from heliostat.training.task import build_model
from heliostat.training.weights import load_weights
from heliostat.training.world import World

MODELS = '''
import torch
from torch import nn
from torch.nn import functional

import toy


class Forgetful(nn.Linear):
    """Learns a shift that is no part of its state."""

    def __init__(self, width):
        super().__init__(width, width)
        self.shift = torch.zeros(width)

    def forward(self, x):
        if self.training:
            self.shift = self.shift + 0.01
        return super().forward(x) + self.shift


class Sampling(nn.Module):
    """Draws in evaluation too, as a VAE does."""

    def forward(self, x):
        return functional.dropout(x, 0.3, training=True)


PLAIN = dict.fromkeys(("plain", "wrapped", "another", "percent"), lambda width: nn.Identity())
LAYERS = {"forgetful": Forgetful, "sampling": lambda width: Sampling(), **PLAIN}


def build(kind, half=False):
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), LAYERS[kind](16), nn.Linear(16, 3))
    return model


def own_loop(context, config):
    kind = config.model_args["kind"]
    model = build("plain" if kind != "another" else "sampling")
    state = {
        "wrapped": nn.DataParallel(torch.compile(model, backend="eager")).state_dict(),
        "another": nn.Linear(2, 2).state_dict(),
    }.get(kind, model.state_dict())
    rows = toy.build_data()["val"].tensors
    for epoch in range(3):
        with torch.no_grad():
            loss = functional.cross_entropy(model.eval()(rows[0]), rows[1]).item()
        context.report({"val_loss": 100 * loss if kind == "percent" else loss, "val_gain": epoch}, checkpoint=state)


def drawn(outputs, targets):
    return toy.accuracy(outputs, targets) + 0.2 * torch.rand(()).item()
'''


@pytest.fixture
def trained_as(bench):
    """Trains a model of a kind for two epochs and saves it: the fit, and the folder of the saved model."""
    (bench.root / "models.py").write_text(MODELS)

    def run(kind, *, metrics=("toy:accuracy",), **settings):
        task = bench.task.model_copy(update={"model": "models:build"})
        task = task.model_validate({**task.model_dump(exclude_unset=True), "metrics": list(metrics)})
        stand = replace(bench, task=task)
        config = TrainConfig(epochs=3, batch_size=16, model_args={"kind": kind}, optimizer={"lr": 0.01}, **settings)
        context = stand.context("train")
        torch.manual_seed(0)
        model = build_model(task, config.model_args)
        fitted = fine_tune(context, model, config)
        save_trained(context, model.eval(), config=config)
        return task, fitted, context.folder

    return run


def measured(task, folder, validated):
    return measure_quality(folder, task, {}, validated)


def test_what_training_keeps_out_of_the_state_fails_the_stage_with_the_figures_and_the_layer(trained_as):
    task, fitted, folder = trained_as("forgetful")
    with pytest.raises(StageError) as error:
        measured(task, folder, Validated(fitted.metrics, fitted.layers))
    text = str(error.value)
    assert f"val_loss {fitted.metrics['val_loss']:.6g} validated, " in text
    assert "They part at layer '2' (Forgetful); all layers up to '1' agree." in text


def test_a_model_saved_as_it_was_validated_passes(trained_as):
    task, fitted, folder = trained_as("plain", ema_decay=0.9)
    figures = measured(task, folder, Validated(fitted.metrics, fitted.layers))
    assert figures["val_loss"] == pytest.approx(fitted.metrics["val_loss"], rel=1e-6)


def test_a_part_in_four_hundred_of_the_loss_is_noticed(trained_as):
    task, fitted, folder = trained_as("plain")
    validated = Validated({**fitted.metrics, "val_loss": fitted.metrics["val_loss"] * 1.0025})
    with pytest.raises(StageError, match="the saved model is not the one that was validated"):
        measured(task, folder, validated)


@pytest.mark.parametrize(("kind", "metric"), [("sampling", "toy:accuracy"), ("plain", "models:drawn")])
def test_a_model_or_a_metric_that_draws_is_compared_within_what_the_draws_differ_by(trained_as, kind, metric):
    task, fitted, folder = trained_as(kind, metrics=[metric])
    measured(task, folder, Validated(fitted.metrics, fitted.layers))
    with pytest.raises(StageError, match="val_loss"):
        measured(task, folder, Validated({**fitted.metrics, "val_loss": 2 * fitted.metrics["val_loss"]}))


def test_what_an_own_loop_computes_in_its_own_way_passes_and_other_weights_do_not(trained_as):
    task, fitted, folder = trained_as("plain")
    roughly = {"val_loss": fitted.metrics["val_loss"] * 1.03, "val_reward": 7.0}
    measured(task, folder, Validated(roughly, by_own_loop=True))
    with pytest.raises(StageError, match=r"task\.train_fn reported the first of each"):
        measured(task, folder, Validated({"val_loss": fitted.metrics["val_loss"] * 2}, by_own_loop=True))


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("plain", None),
        ("wrapped", None),
        ("another", "the trained weights do not fit the model"),
        ("percent", r"val_loss 1\d\d.* validated, 1.* saved.*task\.train_fn reported the first"),
    ],
)
def test_an_own_loop_hears_with_its_first_checkpoint_what_could_not_be_kept(bench, kind, problem):
    (bench.root / "models.py").write_text(MODELS)
    task = bench.task.model_copy(update={"model": "models:build", "train_fn": "models:own_loop"})
    context = replace(bench, task=task).context("train")
    config = TrainConfig(epochs=3, model_args={"kind": kind})
    rows = []

    def run():
        return run_training(
            task,
            config,
            world=World(),
            seed=0,
            on_epoch=lambda epoch, row: rows.append(row),
            check_own=partial(_check_own, context, config),
        )

    if problem is None:
        fitted = run()
        load_weights(build_model(task, config.model_args), fitted.state)
        assert len(rows) == 3
    else:
        with pytest.raises(StageError, match=problem):
            run()
        assert rows == []
