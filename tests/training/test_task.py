import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from heliostat.errors import SpecError
from heliostat.training.config import TrainConfig
from heliostat.training.run import run_training
from heliostat.training.task import build_data, build_model, build_objective
from heliostat.training.world import World


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A task whose module `toy` counts how often its data is read."""
    toy: Any = ModuleType("toy")
    toy.reads = []

    def read(num_samples: int = 12) -> dict[str, TensorDataset]:
        toy.reads.append(num_samples)
        inputs = torch.eye(4).repeat(num_samples // 4, 1)
        splits = TensorDataset(inputs, inputs.argmax(dim=1))
        return {"train": splits, "val": splits}

    toy.build_data = read
    toy.build_model = lambda width=8: nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 4))
    toy.accuracy = lambda outputs, targets: (outputs.argmax(1) == targets).float().mean()
    toy.error = lambda outputs, targets: (outputs.argmax(1) != targets).float().mean()
    monkeypatch.setitem(sys.modules, "toy", toy)
    return SimpleNamespace(
        train_step=None,
        model="toy:build_model",
        data="toy:build_data",
        loss="torch.nn.functional:cross_entropy",
        metrics=(
            SimpleNamespace(reference="toy:accuracy", name="accuracy", mode="max"),
            SimpleNamespace(reference="toy:error", name="error", mode="min"),
        ),
        train_fn=None,
    )


def toy() -> Any:
    return sys.modules["toy"]


def test_a_task_trains_with_the_configs_arguments(task: Any) -> None:
    config = TrainConfig(epochs=3, model_args={"width": 5}, data_args={"num_samples": 8}, optimizer={"lr": 0.1})
    result = run_training(task, config, world=World(), seed=0)
    assert result.state["0.weight"].shape == (5, 4)
    assert toy().reads == [8]
    assert {"val_accuracy", "val_error"} <= set(result.metrics)


def test_the_seed_decides_the_initial_weights(task: Any) -> None:
    config = TrainConfig(epochs=1, optimizer={"lr": 1e-9})
    states = [run_training(task, config, world=World(), seed=seed).state["0.weight"] for seed in (0, 0, 1)]
    assert torch.equal(states[0], states[1])
    assert not torch.allclose(states[0], states[2])


def test_data_is_read_once_per_process_and_arguments(task: Any) -> None:
    assert build_data(task, {"num_samples": 8}) is build_data(task, {"num_samples": 8})
    build_data(task, {"num_samples": 16})
    assert toy().reads == [8, 16]


def test_another_module_of_the_same_name_has_data_of_its_own(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_data(task, {})
    other: Any = ModuleType("toy")
    other.build_data = lambda: {"train": [1], "val": [1]}
    monkeypatch.setitem(sys.modules, "toy", other)
    assert build_data(task, {}) is not first


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([], "returned list, not a mapping"),
        ({"train": [1]}, "no 'val' split"),
        ({"train": [1], "valid": [1]}, "no 'val' split; did you mean 'valid'"),
        ({"train": [1], "val": iter([1])}, "list_iterator for 'val'; it must be a Dataset with"),
        ({"train": [1], "val": []}, "no samples for 'val'"),
    ],
)
def test_data_of_another_shape_is_refused(task: Any, returned: Any, message: str) -> None:
    toy().build_data = lambda: returned
    with pytest.raises(SpecError, match=message):
        build_data(task, {})


def test_a_model_function_must_return_a_module(task: Any) -> None:
    toy().build_model = lambda: "no model"
    with pytest.raises(SpecError, match="toy:build_model returned str, not a torch"):
        build_model(task, {})


def test_the_monitor_is_the_first_metric_else_the_loss_or_what_the_config_says(task: Any) -> None:
    assert build_objective(task).monitor(TrainConfig()) == ("val_accuracy", "max")
    assert build_objective(task).monitor(TrainConfig(monitor="val_error")) == ("val_error", "min")
    task.metrics = ()
    assert build_objective(task).monitor(TrainConfig()) == ("val_loss", "min")


def test_a_loss_class_is_made_an_instance(task: Any) -> None:
    task.loss = "torch.nn:CrossEntropyLoss"
    assert isinstance(build_objective(task).loss, nn.CrossEntropyLoss)
