from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from heliostat.core.imports import use_root
from heliostat.core.spec import Task
from heliostat.errors import StageError
from heliostat.training.config import TrainConfig
from heliostat.training.folds import assign_folds, classes_of, cross_validate, cut_folds, row_over_folds
from heliostat.training.run import run_training
from heliostat.training.task import Data, build_data
from heliostat.training.world import World

TOY = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

def build_model(dropout=0.0):
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3))

def build_data():
    targets = torch.arange(90) % 3
    inputs = torch.randn(90, 8, generator=torch.Generator().manual_seed(0)) + torch.eye(8)[targets]
    return {"train": TensorDataset(inputs[:60], targets[:60]), "val": TensorDataset(inputs[60:], targets[60:])}

def build_fold(held_out):
    from heliostat.training.folds import cut_folds
    return cut_folds(build_data(), folds=3, seed=7)[held_out]

def accuracy(outputs, targets):
    return (outputs.argmax(dim=1) == targets).double().mean().item()
"""


@pytest.fixture
def task(tmp_path: Path) -> Task:
    (tmp_path / "folded.py").write_text(TOY)
    use_root(tmp_path)
    return Task(model="folded:build_model", data="folded:build_data", metrics=["folded:accuracy"])


def without_times(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: v for name, v in row.items() if not name.endswith("_s") and name != "seconds"} for row in rows]


def cross_validated(task: Task, folds: list[Data], **changes: Any) -> tuple[list[dict[str, float]], list[Any]]:
    rows: list[dict[str, float]] = []
    settings = {"epochs": 3, "batch_size": 8, "model_args": {"dropout": 0.5}} | changes
    fits = cross_validate(
        task, TrainConfig(**settings), folds, world=World(), seed=5, on_epoch=lambda _, row: rows.append(row)
    )
    return rows, fits


def test_each_fold_is_trained_as_if_it_were_alone(task: Task) -> None:
    _, fits = cross_validated(task, cut_folds(build_data(task, {}), folds=3, seed=7))
    fold_task = task.model_copy(update={"data": "folded:build_fold"})
    for number, together in enumerate(fits):
        config = TrainConfig(epochs=3, batch_size=8, model_args={"dropout": 0.5}, data_args={"held_out": number})
        alone = run_training(fold_task, config, world=World(), seed=5)
        assert without_times(together.history) == without_times(alone.history)
        assert all(torch.equal(together.state[name], tensor) for name, tensor in alone.state.items())


def test_a_row_is_the_mean_over_folds_with_the_spread(task: Task) -> None:
    rows, fits = cross_validated(task, cut_folds(build_data(task, {}), folds=3, seed=7))
    values = torch.tensor([fit.history[1]["val_accuracy"] for fit in fits], dtype=torch.float64)
    assert rows[1]["val_accuracy"] == pytest.approx(values.mean().item())
    assert rows[1]["val_accuracy_std"] == pytest.approx(values.std().item())
    assert {name for name in rows[0] if name.endswith("_std")} == {"val_loss_std", "val_accuracy_std"}


def test_times_add_up_over_folds() -> None:
    assert row_over_folds([{"seconds": 1.0, "val_s": 2.0, "lr": 0.1}] * 3) == pytest.approx(
        {"seconds": 3.0, "val_s": 6.0, "lr": 0.1}
    )


def test_a_figure_that_is_not_a_number_in_one_fold_is_none_over_all() -> None:
    row = row_over_folds([{"val_loss": 1.0}, {"val_loss": float("nan")}, {"val_loss": 2.0}])
    assert all(value != value for value in row.values())


def test_all_folds_end_together_when_told_to(task: Task) -> None:
    folds = cut_folds(build_data(task, {}), folds=3, seed=7)
    fits = cross_validate(
        task, TrainConfig(epochs=9), folds, world=World(), seed=5, on_epoch=lambda epoch, row: epoch == 2
    )
    assert [fit.epochs for fit in fits] == [2, 2, 2]


def test_all_folds_end_together_when_their_mean_gets_no_better(task: Task) -> None:
    rows, fits = cross_validated(
        task,
        cut_folds(build_data(task, {}), folds=3, seed=7),
        epochs=60,
        early_stop_epochs=2,
        optimizer={"lr": 0.05},
    )
    (epochs,) = {fit.epochs for fit in fits}
    means = [row["val_accuracy"] for row in rows]
    assert epochs == len(means) == means.index(max(means)) + 1 + 2 < 60


def test_folds_are_parts_of_train_that_do_not_meet(task: Task) -> None:
    data = build_data(task, {})
    folds = cut_folds(data, folds=5, seed=0)
    held_out = [index for fold in folds for index in fold["val"].indices]  # type: ignore[attr-defined]
    assert sorted(held_out) == list(range(60))
    for fold in folds:
        train, val = fold["train"], fold["val"]
        assert isinstance(train, Subset)
        assert isinstance(val, Subset)
        assert train.dataset is val.dataset is data["train"]
        assert not set(train.indices) & set(val.indices)
        assert len(train) + len(val) == 60


def test_each_fold_has_each_class_in_its_share_and_all_folds_one_size() -> None:
    classes = torch.tensor([0] * 50 + [1] * 17 + [2] * 6)
    fold_of = assign_folds(classes, folds=5, seed=3)
    assert sorted(fold_of.bincount().tolist()) == [14, 14, 15, 15, 15]
    for label in range(3):
        counts = fold_of[classes == label].bincount(minlength=5)
        assert counts.max() - counts.min() <= 1


def test_the_seed_alone_decides_the_folds() -> None:
    classes = torch.arange(40) % 4
    assert torch.equal(assign_folds(classes, folds=4, seed=1), assign_folds(classes, folds=4, seed=1))
    assert not torch.equal(assign_folds(classes, folds=4, seed=1), assign_folds(classes, folds=4, seed=2))


class Listed(Dataset[Any]):
    def __init__(self, targets: list[Any]) -> None:
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Any:
        return torch.zeros(2), self.targets[index]


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (Listed([2, 0, 1]), [2, 0, 1]),
        (Subset(TensorDataset(torch.zeros(4, 1), torch.tensor([5, 6, 7, 8])), [3, 1]), [8, 6]),
        (Listed([0.5, 1.5]), [0, 0]),
        (TensorDataset(torch.zeros(2, 1), torch.ones(2, 3, dtype=torch.long)), [0, 0]),
        (Listed([torch.zeros(2), torch.zeros(3)]), [0, 0]),
    ],
)
def test_whole_numbers_are_classes_and_nothing_else_is(dataset: Dataset[Any], expected: list[int]) -> None:
    assert classes_of(dataset).tolist() == expected


def test_what_cannot_be_cut_is_refused() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([])

    with pytest.raises(StageError, match="this one is a stream"):
        cut_folds({"train": Stream()}, folds=2, seed=0)
    with pytest.raises(StageError, match="3 training samples cannot be cut into 5 folds"):
        cut_folds({"train": Listed([0, 1, 2])}, folds=5, seed=0)
