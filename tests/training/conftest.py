from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from heliostat.training.task import Metric, Objective


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    return (outputs.argmax(dim=1) == targets).double().mean().item()


def make_blobs(num_samples: int, *, seed: int) -> TensorDataset:
    """Three separable classes of eight features."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(num_samples) % 3
    inputs = torch.randn(num_samples, 8, generator=generator) + 3 * torch.eye(8)[targets]
    return TensorDataset(inputs, targets)


def make_model(*, seed: int = 0, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def data() -> dict[str, Dataset[Any]]:
    return {"train": make_blobs(61, seed=1), "val": make_blobs(30, seed=2)}


@pytest.fixture
def objective() -> Objective:
    return Objective(nn.functional.cross_entropy, (Metric("accuracy", accuracy, "max"),))


@pytest.fixture
def new_model() -> Callable[..., nn.Module]:
    return make_model
