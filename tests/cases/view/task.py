"""Dense maps, with a loss and a metric that flatten them by `view`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset


def images(num_samples: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    targets = (torch.rand(num_samples, 2, 8, 8, generator=generator) > 0.5).float()
    noise = torch.randn(num_samples, 3, 8, 8, generator=generator)
    return TensorDataset(noise + targets[:, :1] - targets[:, 1:], targets)


def build_data() -> dict[str, TensorDataset]:
    return {"train": images(48, 0), "val": images(24, 1), "test": images(24, 2)}


def build_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 2, 1))


def dice_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    likely, wanted = torch.sigmoid(outputs).view(-1), targets.view(-1)
    return 1 - 2 * (likely * wanted).sum() / (likely.sum() + wanted.sum())


def bce(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs, targets)


def dice(outputs: Tensor, targets: Tensor) -> float:
    found, wanted = (outputs > 0).view(-1).float(), targets.view(-1)
    return float(2 * (found * wanted).sum() / (found.sum() + wanted.sum()))
