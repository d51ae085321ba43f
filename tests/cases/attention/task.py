"""Transformers whose attention is written by hand: three projections, one packed projection, and BERT's way."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

HEADS, WIDTH = 4, 64


def sequences(num_samples: int, seed: int, *, tokens: bool) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(3, (num_samples,), generator=generator)
    if tokens:
        return TensorDataset(
            torch.randint(1, 30, (num_samples, 16), generator=generator) + 20 * targets[:, None], targets
        )
    return TensorDataset(torch.randn(num_samples, 16, WIDTH, generator=generator) + targets[:, None, None], targets)


def build_data(tokens: bool = False) -> dict[str, TensorDataset]:
    sizes = {"train": 96, "val": 48, "test": 48}
    return {split: sequences(size, seed, tokens=tokens) for seed, (split, size) in enumerate(sizes.items())}


class Block(nn.Module):
    """Attention and an MLP, each behind its layer norm or, as in BERT, before it."""

    def __init__(self, *, packed: bool, norm_last: bool = False) -> None:
        super().__init__()
        self.norm_last = norm_last
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.packed = nn.Linear(WIDTH, 3 * WIDTH) if packed else None
        if not packed:
            self.q, self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def attend(self, h: Tensor) -> Tensor:
        batch, length, _ = h.shape
        if self.packed is not None:
            q, k, v = self.packed(h).reshape(batch, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        else:
            parts = (layer(h).view(batch, length, HEADS, WIDTH // HEADS) for layer in (self.q, self.k, self.v))
            q, k, v = (part.transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))

    def feed(self, h: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(h)))

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_last:
            x = self.norms[0](x + self.attend(x))
            return self.norms[1](x + self.feed(x))
        x = x + self.attend(self.norms[0](x))
        return x + self.feed(self.norms[1](x))


class Classifier(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, WIDTH) if kind == "bert" else None
        self.positions = nn.Parameter(torch.randn(1, 16, WIDTH) * 0.1)
        self.blocks = nn.Sequential(*(Block(packed=kind == "packed", norm_last=kind == "bert") for _ in range(2)))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.embedding is None else self.embedding(x)
        return self.head(self.blocks(h + self.positions).mean(1))


def build_model(kind: str) -> nn.Module:
    return Classifier(kind)


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    return float((outputs.argmax(1) == targets).float().mean())
