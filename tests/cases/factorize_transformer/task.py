"""A classifier of torch's own encoder layers, whose attention reads the weights of its projections."""

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset


def sequences(num_samples: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(3, (num_samples,), generator=generator)
    return TensorDataset(torch.randn(num_samples, 12, 64, generator=generator) + targets[:, None, None], targets)


def build_data() -> dict[str, TensorDataset]:
    return {"train": sequences(96, 0), "val": sequences(48, 1), "test": sequences(48, 2)}


class Classifier(nn.Module):
    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


def build_model(norm_first: bool = False) -> nn.Module:
    return Classifier(norm_first)


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    return float((outputs.argmax(1) == targets).float().mean())
