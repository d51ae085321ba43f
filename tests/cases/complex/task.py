"""A layer of a Fourier neural operator: complex weights beside real ones."""

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset


def rows(num_samples: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_samples, 8, 22, generator=generator)
    return TensorDataset(inputs, inputs.roll(1, 2))


def build_data() -> dict[str, TensorDataset]:
    return {"train": rows(64, 0), "val": rows(32, 1), "test": rows(32, 2)}


class FourierLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(8, 8, 12, dtype=torch.cfloat) * 0.02)
        self.mix = nn.Conv1d(8, 8, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        spectrum = torch.einsum("bif,iof->bof", torch.fft.rfft(inputs), self.weights)
        return self.mix(torch.fft.irfft(spectrum, n=22))


def build_model() -> nn.Module:
    return FourierLayer()
