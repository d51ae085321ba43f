"""Your model and your data: plain functions that pipeline.yaml refers to. Nothing needs to be subclassed."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset


def build_model(width: int = 32, dropout: float = 0.0) -> nn.Module:
    """A network that takes a batch of inputs and gives a batch of outputs. The arguments are what a search may vary."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(width * 16, 10),
    )


def build_data() -> dict[str, Dataset]:
    """The splits. `train` is learned from, `val` is what choices go by, `test` is only reported.

    Here: 1,797 handwritten digits of 8x8 pixels that come with scikit-learn (UCI, CC BY 4.0).
    """
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = {"train": order[:1200], "val": order[1200:1500], "test": order[1500:]}
    return {split: TensorDataset(images[index], labels[index]) for split, index in parts.items()}


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """A metric sees the outputs and targets of a whole split; higher is better unless the pipeline says otherwise."""
    return (outputs.argmax(dim=1) == targets).float().mean().item()
