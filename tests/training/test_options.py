"""The options of the loop: schedulers, optimizers, averages, precision, streams, own steps, validation by step."""

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from heliostat.core.paths import overlay
from heliostat.errors import SpecError
from heliostat.training.checkpoints import Checkpoints
from heliostat.training.config import TrainConfig
from heliostat.training.ema import Ema
from heliostat.training.loop import evaluate, fit
from heliostat.training.optim import build_optimizer, build_schedule
from heliostat.training.schedule_config import SCHEDULERS
from heliostat.training.task import Objective, build_data

Data = Mapping[str, Dataset[Any]]
NewModel = Callable[..., nn.Module]
OPTIONS: dict[str, dict[str, Any]] = {
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "cycle_momentum": False},
    "ExponentialLR": {"gamma": 0.5},
    "MultiStepLR": {"milestones": [1, 2]},
    "StepLR": {"step_size": 1},
}


@pytest.fixture
def train(data: Data, objective: Objective, new_model: NewModel) -> Callable[..., Any]:
    """A short fit with options of the config."""

    def run(*, data: Data = data, objective: Objective = objective, kept: Checkpoints | None = None, **options: Any):
        config = TrainConfig(**{"epochs": 3, "batch_size": 8, "optimizer": {"name": "sgd", "lr": 0.1}, **options})
        return fit(new_model(), data, config, objective=objective, seed=1, checkpoints=kept)

    return run


def assert_same_weights(one: Any, other: Any) -> None:
    assert all(torch.equal(one.state[name], tensor) for name, tensor in other.state.items())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_that_the_config_knows_can_be_built_and_steps(name: str) -> None:
    config = TrainConfig(scheduler={"name": name, "options": OPTIONS.get(name, {})})
    optimizer = build_optimizer(nn.Linear(2, 1).parameters(), config.optimizer)
    schedule = build_schedule(optimizer, config.scheduler, epochs=3, steps_per_epoch=None)
    for _ in range(3):
        optimizer.step()
        schedule.epoch_over(1.0)


def test_a_scheduler_by_name_steps_once_an_epoch_or_once_a_step(train: Callable[..., Any]) -> None:
    halving = {"name": "ExponentialLR", "options": {"gamma": 0.5}}
    assert [row["lr"] for row in train(scheduler=halving).history] == [0.1, 0.05, 0.025]
    by_step = train(scheduler=halving | {"per": "step"}, steps_per_epoch=2).history
    assert [row["lr"] for row in by_step] == [0.1 / 2, 0.1 / 8, 0.1 / 32]


@pytest.mark.parametrize("per", ["epoch", "step"])
@pytest.mark.parametrize(
    ("name", "options", "end"),
    [
        ("OneCycleLR", {"pct_start": 0.25}, 0.0),
        ("CosineAnnealingLR", {}, 0.0),
        ("PolynomialLR", {}, 0.0),
        ("LinearLR", {"start_factor": 1.0, "end_factor": 0.5}, 0.05),
    ],
)
def test_a_schedule_lasts_for_the_whole_training_where_its_length_is_left_out(
    train: Callable[..., Any], tmp_path: Path, name: str, options: dict[str, Any], end: float, per: str
) -> None:
    scheduler = {"name": name, "options": options, "per": per}
    rates = [row["lr"] for row in train(epochs=8, scheduler=scheduler).history]
    assert max(rates) == pytest.approx(0.1, rel=0.3)
    assert rates[-1] == pytest.approx(end, abs=0.02)
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert len(set(rates)) == 8
    train(epochs=8, scheduler=scheduler, kept=Checkpoints(tmp_path))
    kept = Checkpoints(tmp_path)
    for file in sorted(tmp_path.iterdir())[-1:]:
        file.unlink()
    assert [row["lr"] for row in train(epochs=8, scheduler=scheduler, kept=kept).history] == rates


def test_a_cycle_that_would_end_before_the_training_is_refused(train: Callable[..., Any]) -> None:
    short = {"name": "OneCycleLR", "per": "step", "options": {"total_steps": 10}}
    with pytest.raises(SpecError, match=r"OneCycleLR ends after 10 steps .* stepped 24 times.*leave total_steps out"):
        train(scheduler=short)


def test_a_schedule_by_step_over_a_stream_of_unknown_length_asks_for_the_steps(
    data: Data, train: Callable[..., Any]
) -> None:
    stream = {**data, "train": Stream([data["train"][i] for i in range(20)])}
    scheduler = {"name": "OneCycleLR", "per": "step"}
    with pytest.raises(SpecError, match=r"scheduler.options.total_steps: the training data has no length"):
        train(data=stream, scheduler=scheduler)
    train(data=stream, scheduler=scheduler, steps_per_epoch=2)


def test_options_that_a_scheduler_refuses_are_named_before_training(train: Callable[..., Any]) -> None:
    with pytest.raises(SpecError, match=r"scheduler.options: OneCycleLR: .*pct_start"):
        train(scheduler={"name": "OneCycleLR", "options": {"pct_start": 2.0}})


def test_a_search_may_take_another_scheduler_than_the_file_names() -> None:
    config = overlay(TrainConfig(scheduler={"name": "LinearLR"}), {"scheduler.name": "cosine"})
    assert config.scheduler.options == {}


def test_a_plateau_lowers_the_rate_in_the_direction_of_the_monitor(train: Callable[..., Any]) -> None:
    """Accuracy gets better by being higher, so its best possible value is a plateau only when it stays."""
    plateau = {"name": "ReduceLROnPlateau", "options": {"patience": 0, "factor": 0.1}}
    history = train(epochs=8, scheduler=plateau, optimizer={"name": "sgd", "lr": 0.5}).history
    accuracies = [row["val_accuracy"] for row in history]
    rate = 0.5
    for epoch, row in enumerate(history):
        assert row["lr"] == pytest.approx(rate)
        if epoch and accuracies[epoch] <= max(accuracies[:epoch]) * (1 + 1e-4):
            rate *= 0.1
    assert rate < 0.5


def test_an_optimizer_by_import_path_is_torchs_own_one(train: Callable[..., Any]) -> None:
    path = {"name": "torch.optim:SGD", "lr": 0.1, "momentum": 0.9, "options": {"dampening": 0.5}}
    sgd = [train(optimizer=path | {"options": options}) for options in ({"dampening": 0.5}, {})]
    assert_same_weights(train(optimizer={"name": "sgd", "lr": 0.1, "momentum": 0.9}), sgd[1])
    assert not torch.equal(sgd[0].state["0.weight"], sgd[1].state["0.weight"])


def test_the_averaged_weights_are_what_is_evaluated_and_kept_and_training_goes_on_without_them(
    data: Data, train: Callable[..., Any], objective: Objective, new_model: NewModel
) -> None:
    options = {"epochs": 2, "monitor": "train_loss"}
    averaged, plain = train(ema_decay=0.9, **options), train(**options)
    assert [row["train_loss"] for row in averaged.history] == [row["train_loss"] for row in plain.history]
    model = new_model()
    model.load_state_dict(averaged.state)
    kept = evaluate(model, data["val"], objective, split="val", batch_size=8)
    assert kept["val_loss"] == averaged.metrics["val_loss"] != plain.metrics["val_loss"]


def test_what_is_done_to_the_weights_after_a_step_holds_for_their_average(
    data: Data, objective: Objective, new_model: NewModel
) -> None:
    """Such as the zeros of a pruned model."""

    def cut(model: nn.Module) -> None:
        with torch.no_grad():
            model[0].weight[:, :4] = 0.0  # type: ignore[index]

    model = new_model()
    cut(model)
    config = TrainConfig(epochs=1, batch_size=8, ema_decay=0.9)
    state = fit(model, data, config, objective=objective, seed=1, after_step=cut).state
    assert state["0.weight"][:, :4].eq(0).all()


def test_the_average_forgets_faster_in_the_beginning(new_model: NewModel) -> None:
    """Written out by hand."""
    model = new_model()
    ema = Ema(model, 0.5)
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    for number in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        ema.update()
        decay = min(0.5, (1 + number) / (10 + number))
        expected = {k: decay * v + (1 - decay) * model.state_dict()[k] for k, v in expected.items()}
    last = {k: v.clone() for k, v in model.state_dict().items()}
    with ema.applied():
        torch.testing.assert_close(dict(model.state_dict()), expected)
    torch.testing.assert_close(dict(model.state_dict()), last, rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_averages_and_loss_scales_survive_an_interruption_bit_for_bit(
    train: Callable[..., Any], tmp_path: Path, precision: str
) -> None:
    options: dict[str, Any] = {"ema_decay": 0.9, "precision": precision, "deterministic": True}
    train(epochs=2, kept=Checkpoints(tmp_path), **options)
    assert_same_weights(train(kept=Checkpoints(tmp_path), **options), train(**options))


def test_fp16_trains_fp32_weights(train: Callable[..., Any]) -> None:
    result = train(precision="fp16", epochs=6)
    assert result.metrics["val_accuracy"] > 0.8
    assert {tensor.dtype for tensor in result.state.values()} == {torch.float32}


def test_deterministic_is_asked_of_torch_and_leaves_the_process_as_it_was(train: Callable[..., Any]) -> None:
    asked: list[bool] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.requires_grad:  # it is also tried before training
            asked.append(torch.are_deterministic_algorithms_enabled())
        return nn.functional.cross_entropy(outputs, targets)

    train(objective=Objective(loss), deterministic=True, epochs=1)
    assert asked[0]
    assert not torch.are_deterministic_algorithms_enabled()


def test_validation_by_step_is_reported_and_changes_nothing(train: Callable[..., Any]) -> None:
    """Eight steps an epoch."""
    result = train(epochs=2, validate_every_steps=3)
    assert [row["step"] for row in result.validations] == [3, 6, 9, 12, 15]
    assert {"val_loss", "val_accuracy"} < set(result.validations[0])
    assert_same_weights(result, train(epochs=2))


def test_an_epoch_ends_after_so_many_steps(train: Callable[..., Any]) -> None:
    validations = train(epochs=2, steps_per_epoch=2, validate_every_steps=1).validations
    assert [row["step"] for row in validations] == [1, 2, 3, 4]


class Stream(IterableDataset[Any]):
    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Any]:
        return iter(self.samples)


def test_a_stream_is_trained_on_in_its_own_order(data: Data, train: Callable[..., Any]) -> None:
    """With one batch an epoch the order does not matter: a stream then equals the dataset of its samples."""
    samples = [data["train"][i] for i in range(61)]
    streamed = train(data={**data, "train": Stream(samples)}, batch_size=61)
    torch.testing.assert_close(streamed.state, train(batch_size=61).state)
    assert train(data={**data, "train": Stream(samples)}, steps_per_epoch=4, validate_every_steps=4).validations


def test_decay_over_a_stream_of_unknown_length_asks_for_the_steps(data: Data, train: Callable[..., Any]) -> None:
    stream = {**data, "train": Stream([data["train"][i] for i in range(20)])}
    with pytest.raises(SpecError, match="needs the number of steps, and the training data has no length"):
        train(data=stream, scheduler={"name": "cosine"})
    train(data=stream, scheduler={"name": "cosine"}, steps_per_epoch=2)


def test_an_own_train_step_replaces_the_loss_in_training_only(data: Data, train: Callable[..., Any]) -> None:
    def step(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0] * 1.0), batch[1])

    plain = Objective(nn.functional.cross_entropy)
    assert_same_weights(train(objective=Objective(plain.loss, train_step=step)), train(objective=plain))
    smoothed = Objective(plain.loss, train_step=lambda model, batch: 2 * step(model, batch))
    history = train(objective=smoothed, epochs=1).history
    assert history[0]["train_loss"] > 1.5 * history[0]["val_loss"]


@pytest.mark.slow
def test_a_compiled_model_learns_the_same(train: Callable[..., Any]) -> None:
    torch.testing.assert_close(train(compile=True).state, train().state)


def test_rows_of_ray_data_are_tuples_in_the_order_of_the_columns() -> None:
    class Rows:
        """What is used of a Ray Data dataset."""

        context = SimpleNamespace(execution_options=SimpleNamespace())

        def iter_rows(self) -> Iterator[dict[str, Any]]:
            return iter([{"x": torch.ones(2), "y": 1}, {"x": torch.zeros(2), "y": 0}])

    module = ModuleType("streams")
    module.build_data = lambda: {"train": Rows(), "val": Rows()}  # type: ignore[attr-defined]
    sys.modules["streams"] = module
    data: Any = build_data(SimpleNamespace(data="streams:build_data"), {})  # type: ignore[arg-type]
    assert [target for _, target in data["train"]] == [target for _, target in data["val"]] == [1, 0]
    assert len(data["val"]) == 2
