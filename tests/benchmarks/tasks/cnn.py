"""A plain convolutional network for the digits of `pipelines/mnist.py`, with the augmentation of that or without."""

from mnist import Jitter, accuracy, build_data
from torch import nn

__all__ = ["accuracy", "build_data", "build_jittered_model", "build_model"]


def build_model(width: int = 32) -> nn.Module:
    """(batch, 1, 28, 28) in, (batch, 10) logits out; 422,000 parameters at width 32."""
    return nn.Sequential(
        nn.Conv2d(1, width, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * 7 * 7, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def build_jittered_model(width: int = 32) -> nn.Module:
    """The same network, which sees each training image scaled, sheared and shifted at random."""
    return nn.Sequential(Jitter(), *build_model(width).children())
