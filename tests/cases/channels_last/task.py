"""Networks that plain torch trains, and that fail where activations are in channels-last layout."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset


def images(num_samples: int, seed: int, kind: str) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(4, (num_samples,), generator=generator)
    shape = (3, 4, 8, 8) if kind == "video" else (3, 8, 8)
    inputs = torch.randn(num_samples, *shape, generator=generator) + targets.view(-1, *[1] * len(shape))
    if kind == "segmentation":
        return TensorDataset(inputs, targets[:, None, None].expand(num_samples, 8, 8).contiguous())
    return TensorDataset(inputs, targets)


def build_data(kind: str) -> dict[str, TensorDataset]:
    return {"train": images(48, 0, kind), "val": images(24, 1, kind), "test": images(24, 2, kind)}


class ConditionalConvolution(nn.Module):
    """A convolution whose weights depend on the sample."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.weights = nn.Parameter(torch.randn(2, 8 * 8 * 9) * 0.1)
        self.route = nn.Linear(8, 2)
        self.classify = nn.Linear(8, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        maps = self.stem(inputs).relu()
        rows, channels, height, width = maps.shape
        weights = self.route(maps.mean((2, 3))).softmax(1) @ self.weights
        grouped = maps.view(1, rows * channels, height, width)
        found = F.conv2d(grouped, weights.view(rows * 8, 8, 3, 3), padding=1, groups=rows)
        return self.classify(found.view(rows, 8, height, width).mean((2, 3)))


class Video(nn.Module):
    """Convolutions over time and space, and over space."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.classify = nn.Linear(8, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.classify(self.second(self.first(inputs).relu().mean(2)).relu().mean((2, 3)))


class TrainingBranch(nn.Module):
    """A second head that only training has."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.classify = nn.Linear(8, 4)
        self.auxiliary = nn.Linear(8 * 64, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        maps = self.first(inputs).relu()
        outputs = self.classify(maps.mean((2, 3)))
        return outputs + 0.1 * self.auxiliary(maps.view(len(maps), -1)) if self.training else outputs


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.classify = nn.Linear(8 * 64, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        maps = self.first(inputs).relu()
        return self.classify(maps.view(len(maps), -1))


def segmentation() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 1))


def build_model(kind: str) -> nn.Module:
    makers: dict[str, Any] = {
        "segmentation": segmentation,
        "condition": ConditionalConvolution,
        "video": Video,
        "branch": TrainingBranch,
        "flat": Flat,
    }
    model: nn.Module = makers[kind]()
    return model


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    if outputs.dim() != 4:
        return F.cross_entropy(outputs, targets)
    likely = outputs.softmax(1).view(len(outputs), outputs.size(1), -1)
    wanted = F.one_hot(targets.view(len(targets), -1), 4).permute(0, 2, 1).float()
    return 1 - (2 * (likely * wanted).sum(-1) / (likely + wanted).sum(-1).clamp_min(1e-6)).mean()


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    return float((outputs.argmax(1) == targets).float().mean())
