"""Small networks whose channels are coupled in unusual ways."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset


def images(num_samples: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(4, (num_samples,), generator=generator)
    return TensorDataset(torch.randn(num_samples, 3, 16, 16, generator=generator) + targets.view(-1, 1, 1, 1), targets)


def build_data() -> dict[str, TensorDataset]:
    return {"train": images(96, 0), "val": images(48, 1), "test": images(48, 2)}


def conv(inputs: int, outputs: int, kernel: int = 3, **options: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


class Base(nn.Module):
    """Three convolutions, with something of each kind behind the second."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 16), conv(16, 16), conv(16, 16)
        self.head = nn.Linear(16, 4)
        self.add_layers()

    def add_layers(self) -> None: ...

    def middle(self, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor) -> Tensor:
        h = self.middle(self.b(self.a(x).relu()).relu())
        return self.head(self.c(h).relu().mean((2, 3)))


class Cbam(Base):
    def add_layers(self) -> None:
        self.gate = conv(2, 1, 7)

    def middle(self, h: Tensor) -> Tensor:
        return h * torch.sigmoid(self.gate(torch.cat([h.mean(1, True), h.amax(1, True)], 1)))


class AttentionGate(Base):
    def add_layers(self) -> None:
        self.squeeze, self.psi = conv(16, 8, 1), conv(8, 1, 1)

    def middle(self, h: Tensor) -> Tensor:
        return h * torch.sigmoid(self.psi(self.squeeze(h).relu()))


class SqueezeExcite(Base):
    def add_layers(self) -> None:
        self.down, self.up = nn.Linear(16, 4), nn.Linear(4, 16)

    def middle(self, h: Tensor) -> Tensor:
        return h * torch.sigmoid(self.up(self.down(h.mean((2, 3))).relu()))[:, :, None, None]


class MaskedInput(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x).relu() * (x[:, :1] > 0).float()).relu()
        return self.head(self.c(h).relu().mean((2, 3)))


class PixelShuffle(Base):
    def add_layers(self) -> None:
        self.up, self.shuffle = conv(16, 64), nn.PixelShuffle(2)

    def middle(self, h: Tensor) -> Tensor:
        return self.shuffle(self.up(h))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.wide, self.head = conv(3, 16), nn.Linear(16, 32 * 4 * 4), nn.Linear(16, 4)
        self.up = nn.ConvTranspose2d(32, 16, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.wide(self.a(x).relu().mean((2, 3))).view(-1, 32, 4, 4)
        return self.head(self.up(h).relu().mean((2, 3)))


class SpaceToDepth(Base):
    def add_layers(self) -> None:
        self.c = conv(64, 16)

    def middle(self, h: Tensor) -> Tensor:
        n, channels, height, width = h.shape
        parts = h.reshape(n, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
        return parts.reshape(n, channels * 4, height // 2, width // 2)


class DepthwiseMultiplier(Base):
    def add_layers(self) -> None:
        self.depthwise, self.c = conv(16, 32, groups=16), conv(32, 16)

    def middle(self, h: Tensor) -> Tensor:
        return self.depthwise(h).relu()


class Depthwise(Base):
    def add_layers(self) -> None:
        self.depthwise = conv(16, 16, groups=16)

    def middle(self, h: Tensor) -> Tensor:
        return self.depthwise(h).relu()


class GroupNorm(Base):
    num_groups = 8

    def add_layers(self) -> None:
        self.norm = nn.GroupNorm(self.num_groups, 16)

    def middle(self, h: Tensor) -> Tensor:
        return self.norm(h)


class GroupNormOfEach(GroupNorm):
    num_groups = 16


class GroupNormOfHalves(GroupNorm):
    num_groups = 2


class ChannelShuffle(Base):
    def middle(self, h: Tensor) -> Tensor:
        n, channels, height, width = h.shape
        return h.view(n, 2, channels // 2, height, width).transpose(1, 2).reshape(n, channels, height, width)


class LayerScale(Base):
    def add_layers(self) -> None:
        self.scale = nn.Parameter(torch.full((16, 1, 1), 0.5))

    def middle(self, h: Tensor) -> Tensor:
        return h + self.scale * h


class PositionMap(Base):
    def add_layers(self) -> None:
        self.position = nn.Parameter(torch.randn(1, 16, 16, 16) * 0.1)

    def middle(self, h: Tensor) -> Tensor:
        return h + self.position


class AuxiliaryHead(Base):
    def add_layers(self) -> None:
        self.auxiliary = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x).relu()).relu()
        outputs = self.head(self.c(h).relu().mean((2, 3)))
        return outputs + 0.1 * self.auxiliary(h).mean((2, 3)) if self.training else outputs


KINDS: dict[str, Callable[[], nn.Module]] = {
    "cbam": Cbam,
    "attention_gate": AttentionGate,
    "squeeze_excite": SqueezeExcite,
    "masked_input": MaskedInput,
    "pixel_shuffle": PixelShuffle,
    "decoder": Decoder,
    "space_to_depth": SpaceToDepth,
    "depthwise_multiplier": DepthwiseMultiplier,
    "depthwise": Depthwise,
    "group_norm": GroupNorm,
    "group_norm_of_each": GroupNormOfEach,
    "group_norm_of_halves": GroupNormOfHalves,
    "channel_shuffle": ChannelShuffle,
    "layer_scale": LayerScale,
    "position_map": PositionMap,
    "auxiliary_head": AuxiliaryHead,
}


def build_model(kind: str) -> nn.Module:
    return KINDS[kind]()


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    return float((outputs.argmax(1) == targets).float().mean())
