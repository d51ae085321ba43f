"""Next tokens of padded sequences: the loss and the accuracy are means over the tokens that count."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

PADDING = -100


def sequences(num_samples: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(50, (num_samples, 1), generator=generator)
    tokens = (start + torch.arange(17) * 3) % 50
    targets = tokens[:, 1:].clone()
    lengths = torch.randint(1, 15, (num_samples, 1), generator=generator)
    targets[torch.arange(16) >= lengths] = PADDING
    return TensorDataset(tokens[:, :-1].contiguous(), targets)


def build_data() -> dict[str, TensorDataset]:
    return {"train": sequences(96, 0), "val": sequences(70, 1), "test": sequences(30, 2)}


class LanguageModel(nn.Module):
    """A GRU whose last layer shares its weight with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.gru = nn.GRU(32, 32, batch_first=True)
        self.decoder = nn.Linear(32, 50, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.decoder(self.gru(self.embedding(tokens))[0])
        return logits


def build_model() -> nn.Module:
    return LanguageModel()


def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=PADDING)


def loss_and_tokens(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    losses = functional.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="sum")
    return losses, (targets != PADDING).sum()


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    counted = targets != PADDING
    return float((outputs.argmax(-1) == targets)[counted].float().mean())
