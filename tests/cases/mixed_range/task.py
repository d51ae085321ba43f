"""A detector's head: boxes in pixels and a score between 0 and 1, side by side in one output."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset


def rows(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 8, generator=generator)
    box, score = 320 + 160 * torch.tanh(inputs[:, :4]), (inputs[:, 4:5] > 0).float()
    return TensorDataset(inputs, torch.cat([box, score], 1))


def build_data() -> dict[str, TensorDataset]:
    return {"train": rows(400, 0), "val": rows(200, 1), "test": rows(100, 2)}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 64), nn.Linear(64, 64)
        self.box, self.score = nn.Linear(64, 4), nn.Linear(64, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.second(self.first(inputs).relu()).relu()
        return torch.cat([self.box(hidden) * 160 + 320, torch.sigmoid(self.score(hidden))], 1)


def build_model() -> Net:
    return Net()


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    boxes = functional.mse_loss(outputs[:, :4] / 160, targets[:, :4] / 160)
    return boxes + functional.binary_cross_entropy(outputs[:, 4].clamp(1e-4, 1 - 1e-4), targets[:, 4])


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    return float(((outputs[:, 4] > 0.5) == (targets[:, 4] > 0.5)).float().mean())
