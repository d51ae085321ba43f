"""Networks whose layers compute their weights: both weight norms and spectral norm."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm
from torch.utils.data import TensorDataset


def series(num_samples: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(3, (num_samples,), generator=generator)
    return TensorDataset(torch.randn(num_samples, 4, 32, generator=generator) + targets[:, None, None], targets)


def build_data() -> dict[str, TensorDataset]:
    return {"train": series(96, 0), "val": series(48, 1), "test": series(48, 2)}


class Temporal(nn.Module):
    def __init__(self, norm: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.first = norm(nn.Conv1d(4, 16, 3, padding=1))
        self.second = norm(nn.Conv1d(16, 16, 3, padding=1))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        return self.head((h + self.second(h).relu()).mean(2))


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = parametrizations.spectral_norm(nn.Linear(128, 32))
        self.second = parametrizations.spectral_norm(nn.Linear(32, 32))
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x.flatten(1)).relu()).relu())


def build_model(kind: str) -> nn.Module:
    if kind == "spectral":
        return Spectral()
    return Temporal(weight_norm if kind == "hooks" else parametrizations.weight_norm)


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    return float((outputs.argmax(1) == targets).float().mean())
