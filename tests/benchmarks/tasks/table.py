"""The 1,797 rows of 64 numbers in `sklearn.datasets.load_digits`, as a table: nothing is told of their being pixels."""

from itertools import pairwise

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

SPLITS = {"train": 1077, "val": 360, "test": 360}


def build_model(width: int = 64, layers: int = 2, dropout: float = 0.0) -> nn.Module:
    """(batch, 64) in, (batch, 10) logits out."""
    sizes = [64, *[width] * layers]
    hidden = [[nn.Linear(a, b), nn.ReLU(), nn.Dropout(dropout)] for a, b in pairwise(sizes)]
    return nn.Sequential(*[module for block in hidden for module in block], nn.Linear(width, 10))


def build_data() -> dict[str, TensorDataset]:
    rows, targets = load_digits(return_X_y=True)
    inputs, labels = torch.tensor(rows / 16, dtype=torch.float32), torch.tensor(targets)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = zip(SPLITS, order.split(list(SPLITS.values())))
    return {name: TensorDataset(inputs[part], labels[part]) for name, part in parts}


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    return (outputs.argmax(dim=1) == targets).float().mean().item()
