"""Batch norm over vectors, which cannot train on one sample."""

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset


def vectors(num_samples: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(3, (num_samples,), generator=generator)
    return TensorDataset(torch.randn(num_samples, 8, generator=generator) + targets[:, None], targets)


def build_data(n: int = 64) -> dict[str, TensorDataset]:
    return {"train": vectors(n, 0), "val": vectors(60, 1), "test": vectors(60, 2)}


def build_model(width: int = 16) -> nn.Module:
    return nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    return float((outputs.argmax(1) == targets).float().mean())
