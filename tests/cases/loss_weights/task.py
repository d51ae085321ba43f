"""Embeddings that a loss compares with class centres, which it learns (as in ArcFace)."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset


def rows(num_samples: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(10, (num_samples,), generator=generator)
    centres = torch.randn(10, 16, generator=torch.Generator().manual_seed(9))
    return TensorDataset(torch.randn(num_samples, 16, generator=generator) * 0.7 + centres[classes], classes)


def build_data() -> dict[str, TensorDataset]:
    return {"train": rows(400, 0), "val": rows(200, 1), "test": rows(100, 2)}


def build_model() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


class ProxyLoss(nn.Module):
    """Cosine softmax with learned class centres, which differ in every process until they are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10, 4))

    def forward(self, outputs: Tensor, classes: Tensor) -> Tensor:
        cosines = functional.normalize(outputs) @ functional.normalize(self.weight).T
        return functional.cross_entropy(10 * cosines, classes)
