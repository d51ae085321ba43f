"""Language models whose decoder shares the weights of the embedding."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

TOKENS = 50


def text(num_samples: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    rows = (torch.randint(TOKENS, (num_samples, 1), generator=generator) + torch.arange(17) * 3) % TOKENS
    noise = torch.rand(num_samples, 17, generator=generator) < 0.1
    rows = torch.where(noise, torch.randint(TOKENS, (num_samples, 17), generator=generator), rows)
    return TensorDataset(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())


def build_data() -> dict[str, TensorDataset]:
    return {"train": text(256, 0), "val": text(200, 1), "test": text(100, 2)}


class Model(nn.Module):
    def __init__(self, recurrent: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, 32)
        self.recurrent = nn.GRU(32, 32, batch_first=True) if recurrent else None
        self.middle = nn.Linear(32, 32)
        self.decoder = nn.Linear(32, TOKENS, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        h = self.recurrent(h)[0] if self.recurrent is not None else h
        return self.decoder(torch.tanh(self.middle(h)))


def build_model(recurrent: bool = False) -> nn.Module:
    return Model(recurrent)


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    return float((outputs.argmax(-1) == targets).float().mean())
