"""Metrics that need every class, of which one is rare, and metrics that give numbers of other kinds."""

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import TensorDataset


def vectors(num_samples: int, seed: int, *, rare: int = 2) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(2, (num_samples,), generator=generator)
    targets[:rare] = 2
    return TensorDataset(torch.randn(num_samples, 8, generator=generator) + targets[:, None], targets)


def build_data(rare_in_test: int = 2) -> dict[str, TensorDataset]:
    return {"train": vectors(128, 0), "val": vectors(60, 1), "test": vectors(60, 2, rare=rare_in_test)}


def build_model(width: int = 16) -> nn.Module:
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 3))


def auc(outputs: Tensor, targets: Tensor) -> float:
    return float(roc_auc_score(targets, outputs.softmax(1), multi_class="ovr"))


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(1) == targets).float().mean()


def np_accuracy(outputs: Tensor, targets: Tensor) -> np.float32:
    return np.float32((outputs.argmax(1) == targets).float().mean())


def is_good(outputs: Tensor, targets: Tensor) -> bool:
    return bool(accuracy(outputs, targets) > 0.4)


def by_class(outputs: Tensor, targets: Tensor) -> dict[str, float]:
    return {"0": 1.0, "1": 0.5}
