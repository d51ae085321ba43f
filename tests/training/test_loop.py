import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from heliostat.errors import SpecError, StageError
from heliostat.training.checkpoints import Checkpoints
from heliostat.training.config import TrainConfig
from heliostat.training.loop import Fit, evaluate, fit
from heliostat.training.task import Metric, Objective

Data = Mapping[str, Dataset[Any]]
NewModel = Callable[..., nn.Module]
TIMINGS = {"seconds", "train_samples_per_s", "data_s", "train_s", "val_s", "checkpoint_s"}


def without_timings(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in history]


def assert_same(one: Fit, other: Fit) -> None:
    """Bit for bit."""
    assert without_timings(one.history) == without_timings(other.history)
    assert one.epoch == other.epoch
    assert all(torch.equal(one.state[name], tensor) for name, tensor in other.state.items())


class Jittered(Dataset[tuple[Tensor, Tensor]]):
    """Computes its samples, with noise from all three global generators."""

    def __init__(self, source: TensorDataset) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, target = self.source[index]
        return inputs + random.random() + float(np.random.rand()) + torch.rand(()), target


class Plain(Dataset[Any]):
    def __init__(self, source: TensorDataset) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        return self.source[index]


def test_training_learns_and_returns_the_best_epochs_weights(
    data: Data, objective: Objective, new_model: NewModel
) -> None:
    config = TrainConfig(epochs=6, batch_size=8, optimizer={"name": "adam", "lr": 0.01})
    model = new_model()
    result = fit(model, data, config, objective=objective, seed=1)
    assert result.epochs == len(result.history) == 6
    assert result.metrics == result.history[result.epoch - 1]
    assert result.metrics["val_accuracy"] == max(row["val_accuracy"] for row in result.history) > 0.9
    model.load_state_dict(result.state)
    assert evaluate(model, data["val"], objective, split="val")["val_loss"] == pytest.approx(result.metrics["val_loss"])


def test_a_row_has_the_losses_the_metrics_the_learning_rate_and_the_speed(
    data: Data, objective: Objective, new_model: NewModel
) -> None:
    rows: list[dict[str, float]] = []
    config = TrainConfig(epochs=2, batch_size=8)
    fit(new_model(), data, config, objective=objective, seed=1, on_epoch=lambda epoch, row: rows.append(dict(row)))
    assert [set(row) for row in rows] == [{"train_loss", "val_loss", "val_accuracy", "lr"} | TIMINGS] * 2


def test_training_equals_a_loop_written_by_hand(data: Data, objective: Objective, new_model: NewModel) -> None:
    """With one batch an epoch the order of samples does not matter."""
    config = TrainConfig(epochs=5, batch_size=61, optimizer={"name": "sgd", "lr": 0.1}, monitor="train_loss")
    result = fit(new_model(), data, config, objective=objective, seed=1)
    model = new_model()
    inputs, targets = data["train"][:]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for row in result.history:
        loss = nn.functional.cross_entropy(model(inputs), targets)
        assert row["train_loss"] == pytest.approx(loss.item(), abs=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_the_same_seed_gives_the_same_run_and_another_does_not(
    data: Data, objective: Objective, new_model: NewModel
) -> None:
    config = TrainConfig(epochs=2, batch_size=8)
    runs = [fit(new_model(dropout=0.3), data, config, objective=objective, seed=seed) for seed in (1, 1, 2)]
    assert_same(runs[0], runs[1])
    assert runs[0].history[0]["train_loss"] != runs[2].history[0]["train_loss"]


def test_accumulation_leaves_the_global_batch_as_it_is(data: Data, objective: Objective, new_model: NewModel) -> None:
    whole, parts = (
        fit(new_model(), data, TrainConfig(epochs=2, batch_size=8, accumulate_steps=steps), objective=objective, seed=1)
        for steps in (1, 3)
    )
    for row, expected in zip(parts.history, whole.history):
        assert row["train_loss"] == pytest.approx(expected["train_loss"], abs=1e-5)
        assert row["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-5)


def convolutional(*, flatten: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
    return nn.Sequential(*layers, flatten or nn.Flatten(), nn.Linear(4 * 36, 3))


@pytest.fixture
def images() -> Data:
    targets = torch.arange(25) % 3
    inputs = torch.randn(25, 1, 6, 6, generator=torch.Generator().manual_seed(0)) + targets.view(-1, 1, 1, 1)
    return {"train": TensorDataset(inputs, targets), "val": TensorDataset(inputs[:9], targets[:9])}


class View(nn.Module):
    """What refuses channels-last activations."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.view(len(inputs), -1)


def test_a_convolutional_net_trains_the_same_in_either_memory_layout(images: Data, objective: Objective) -> None:
    layouts: list[bool] = []
    config = TrainConfig(epochs=2, batch_size=8, optimizer={"name": "sgd", "lr": 0.05})

    def note_layout(model: nn.Module) -> None:
        layouts.append(model[2].weight.is_contiguous(memory_format=torch.channels_last))  # type: ignore[index, union-attr, operator]

    results = []
    for flatten in (nn.Flatten(), View()):
        model = convolutional(flatten=flatten)
        results.append(fit(model, images, config, objective=objective, seed=1, after_step=note_layout))
        assert all(tensor.is_contiguous() for tensor in (*model.state_dict().values(), *results[-1].state.values()))
    assert layouts == [True] * 8 + [False] * 8
    for name, tensor in results[0].state.items():
        torch.testing.assert_close(tensor, results[1].state[name], rtol=1e-4, atol=1e-4)


def test_an_interrupted_convolutional_net_goes_on_bit_for_bit(
    images: Data, objective: Objective, tmp_path: Path
) -> None:
    config = TrainConfig(epochs=4, batch_size=8)
    checkpoints = Checkpoints(tmp_path)
    fit(
        convolutional(),
        images,
        TrainConfig(epochs=2, batch_size=8),
        objective=objective,
        seed=1,
        checkpoints=checkpoints,
    )
    resumed = fit(convolutional(), images, config, objective=objective, seed=1, checkpoints=checkpoints)
    assert_same(resumed, fit(convolutional(), images, config, objective=objective, seed=1))


@pytest.mark.parametrize("computed", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "rmsprop"])
def test_an_interrupted_fit_equals_an_uninterrupted_one_bit_for_bit(
    data: Data, objective: Objective, new_model: NewModel, tmp_path: Path, computed: bool, optimizer: str
) -> None:
    train = Jittered(data["train"]) if computed else data["train"]  # type: ignore[arg-type]
    data = {"train": train, "val": data["val"]}
    config = TrainConfig(
        epochs=5,
        batch_size=8,
        optimizer={"name": optimizer, "lr": 0.01, **({"momentum": 0.9} if optimizer == "sgd" else {})},
        scheduler={"name": "cosine", "warmup_epochs": 1.5},
    )

    def interrupt(epoch: int, row: Mapping[str, float]) -> None:
        if epoch == 4:
            raise KeyboardInterrupt

    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        fit(
            new_model(dropout=0.3),
            data,
            config,
            objective=objective,
            seed=7,
            checkpoints=checkpoints,
            on_epoch=interrupt,
        )
    torch.manual_seed(999)
    epochs: list[int] = []
    resumed = fit(
        new_model(seed=5, dropout=0.3),
        data,
        config,
        objective=objective,
        seed=7,
        checkpoints=checkpoints,
        on_epoch=lambda epoch, row: epochs.append(epoch),
    )
    assert epochs == [4, 5]
    assert_same(resumed, fit(new_model(dropout=0.3), data, config, objective=objective, seed=7))


def test_a_finished_fit_is_not_trained_again(
    data: Data, objective: Objective, new_model: NewModel, tmp_path: Path
) -> None:
    config = TrainConfig(epochs=3, batch_size=8)
    checkpoints = Checkpoints(tmp_path)
    first = fit(new_model(), data, config, objective=objective, seed=1, checkpoints=checkpoints)
    again = fit(
        new_model(seed=5),
        data,
        config,
        objective=objective,
        seed=1,
        checkpoints=checkpoints,
        on_epoch=lambda epoch, row: pytest.fail("trained again"),
    )
    assert_same(first, again)
    assert again.seconds == first.seconds


def test_a_fit_with_its_newest_checkpoint_damaged_still_ends_the_same(
    data: Data, objective: Objective, new_model: NewModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = TrainConfig(epochs=4, batch_size=8, optimizer={"name": "sgd", "lr": 0.05}, monitor="val_loss")
    checkpoints = Checkpoints(tmp_path)
    first = fit(new_model(), data, config, objective=objective, seed=1, checkpoints=checkpoints)
    newest = max(tmp_path.glob("epoch-00004.*"))
    newest.write_bytes(newest.read_bytes()[:-100])
    again = fit(new_model(seed=5), data, config, objective=objective, seed=1, checkpoints=checkpoints)
    assert_same(first, again)
    assert f"{newest} is damaged" in caplog.text


def test_early_stopping_ends_after_so_many_epochs_without_a_better_figure(data: Data, new_model: NewModel) -> None:
    figures = iter([0.1, 0.5, 0.5, 0.4, 0.9])
    objective = Objective(
        nn.functional.cross_entropy, (Metric("scripted", lambda outputs, targets: next(figures), "max"),)
    )
    result = fit(
        new_model(), data, TrainConfig(epochs=5, batch_size=8, early_stop_epochs=2), objective=objective, seed=1
    )
    assert (result.epochs, result.epoch, result.metrics["val_scripted"]) == (4, 2, 0.5)


def test_a_fit_that_was_told_to_stop_goes_on_when_it_is_taken_up_and_a_stale_one_does_not(
    data: Data, objective: Objective, new_model: NewModel, tmp_path: Path
) -> None:
    def epochs(folder: str, stop_at: int, **options: Any) -> int:
        checkpoints, config = Checkpoints(tmp_path / folder), TrainConfig(batch_size=8, epochs=4, **options)
        told_to_stop = lambda epoch, row: epoch == stop_at  # noqa: E731
        first = fit(
            new_model(), data, config, objective=objective, seed=1, checkpoints=checkpoints, on_epoch=told_to_stop
        )
        again = fit(new_model(), data, config, objective=objective, seed=1, checkpoints=checkpoints)
        return again.epochs - first.epochs

    assert epochs("told", stop_at=2) == 2
    frozen = {"optimizer": {"name": "sgd", "lr": 1e-30}, "early_stop_epochs": 1}
    assert epochs("stale", stop_at=0, **frozen) == 0


def test_the_best_epoch_follows_the_direction_of_the_monitor_and_nan_is_never_best(
    data: Data, new_model: NewModel
) -> None:
    figures = iter([float("nan"), 0.3, 0.2, float("nan"), 0.4])
    objective = Objective(
        nn.functional.cross_entropy, (Metric("error", lambda outputs, targets: next(figures), "min"),)
    )
    assert fit(new_model(), data, TrainConfig(epochs=5, batch_size=8), objective=objective, seed=1).epoch == 3


def test_on_epoch_ends_the_training_by_returning_true(data: Data, objective: Objective, new_model: NewModel) -> None:
    config = TrainConfig(epochs=5, batch_size=8)
    result = fit(new_model(), data, config, objective=objective, seed=1, on_epoch=lambda epoch, row: epoch == 2)
    assert result.epochs == 2


def test_a_loss_that_is_not_finite_says_in_which_epoch_and_step(
    data: Data, objective: Objective, new_model: NewModel
) -> None:
    steps = iter(range(1, 100))

    def explode_at_step_11(outputs: Tensor, batch: tuple[Any, ...]) -> Tensor:
        loss = nn.functional.cross_entropy(outputs, batch[1])
        return loss * float("nan") if next(steps) == 11 else loss

    with pytest.raises(StageError, match="became nan in epoch 2, step 3"):
        fit(
            new_model(),
            data,
            TrainConfig(epochs=2, batch_size=8),
            objective=objective,
            seed=1,
            batch_loss=explode_at_step_11,
        )


def test_tensors_and_a_computed_dataset_of_the_same_samples_train_the_same(
    data: Data, objective: Objective, new_model: NewModel
) -> None:
    config = TrainConfig(epochs=2, batch_size=8)
    plain = {split: Plain(dataset) for split, dataset in data.items()}  # type: ignore[arg-type]
    assert_same(
        fit(new_model(dropout=0.3), data, config, objective=objective, seed=1),
        fit(new_model(dropout=0.3), plain, config, objective=objective, seed=1),
    )


def test_warm_up_and_decay_are_by_step(data: Data, objective: Objective, new_model: NewModel) -> None:
    config = TrainConfig(
        epochs=4,
        batch_size=8,
        optimizer={"name": "sgd", "lr": 0.8},
        scheduler={"name": "linear", "warmup_epochs": 1.0},
    )
    history = fit(new_model(), data, config, objective=objective, seed=1).history
    assert [row["lr"] for row in history] == pytest.approx([0.8, 0.8 * 17 / 24, 0.8 * 9 / 24, 0.8 * 1 / 24])


def test_bf16_trains_fp32_weights(data: Data, objective: Objective, new_model: NewModel) -> None:
    config = TrainConfig(epochs=5, batch_size=8, precision="bf16", optimizer={"name": "adam", "lr": 0.01})
    result = fit(new_model(), data, config, objective=objective, seed=1)
    assert result.metrics["val_accuracy"] > 0.8
    assert {tensor.dtype for tensor in result.state.values()} == {torch.float32}


def test_extra_columns_reach_the_batch_loss_and_after_step_sees_the_users_model(
    data: Data, objective: Objective, new_model: NewModel
) -> None:
    inputs, targets = data["train"][:]
    train = TensorDataset(inputs, targets, nn.functional.one_hot(targets, 3).float())
    model = new_model()
    models: list[nn.Module] = []
    fit(
        model,
        {"train": train, "val": data["val"]},
        TrainConfig(epochs=1, batch_size=8),
        objective=objective,
        seed=1,
        batch_loss=lambda outputs, batch: nn.functional.mse_loss(outputs, batch[2]),
        after_step=models.append,
    )
    assert len(models) == 8
    assert all(seen is model for seen in models)


def test_frozen_parameters_stay_as_they_are(data: Data, objective: Objective, new_model: NewModel) -> None:
    model = new_model()
    model[0].requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = fit(model, data, TrainConfig(epochs=1, batch_size=8), objective=objective, seed=1).state
    assert torch.equal(state["0.weight"], before["0.weight"])
    assert not torch.equal(state["3.weight"], before["3.weight"])


def test_a_monitor_that_nothing_reports_names_the_nearest(
    data: Data, objective: Objective, new_model: NewModel
) -> None:
    with pytest.raises(SpecError, match="nothing reports 'val_acuracy'; did you mean 'val_accuracy'"):
        fit(new_model(), data, TrainConfig(monitor="val_acuracy"), objective=objective, seed=1)


def test_samples_must_be_tuples(objective: Objective, new_model: NewModel) -> None:
    samples = [{"inputs": torch.zeros(8), "label": 0}] * 4
    data: Any = {"train": samples, "val": samples}
    with pytest.raises(StageError, match=r"inputs: float32 \(8,\), label: int.*must be a tuple"):
        fit(new_model(), data, TrainConfig(epochs=1), objective=objective, seed=1)


def test_evaluation_takes_any_function_and_does_not_depend_on_the_batch_size(data: Data, objective: Objective) -> None:
    weight = torch.randn(8, 3)
    rows = [
        evaluate(lambda inputs: inputs @ weight, data["val"], objective, split="test", batch_size=size)
        for size in (7, 30)
    ]
    assert set(rows[0]) == {"test_loss", "test_accuracy"}
    assert rows[0] == pytest.approx(rows[1])
