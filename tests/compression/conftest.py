"""Small networks of every kind that compression has to deal with, as source that artifacts carry and as modules."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

NETS = '''
import torch
from torch import nn


class ConvNet(nn.Module):
    """Residual connection, batch norm, depthwise and pointwise convolution."""

    def __init__(self, width=8, classes=5):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.block = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.block_norm = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.pointwise = nn.Conv2d(width, 2 * width, 1)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = x + torch.relu(self.block_norm(self.block(x)))
        x = torch.relu(self.pointwise(self.depthwise(x)))
        return self.head(x.mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self, kind="GRU", bidirectional=False):
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.layer = getattr(nn, kind)(16, 12, batch_first=True, bidirectional=bidirectional)
        self.middle = nn.Linear(24 if bidirectional else 12, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(torch.relu(self.middle(self.layer(self.first(x))[0].mean(1))))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.encoder(self.embedding(x)).mean(1))


class Branching(nn.Module):
    """Its control flow depends on the data."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(x) if x.sum() > 0 else -self.head(x)


class FixedReshape(nn.Module):
    """Has the width of a layer written into its forward."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3)
        self.head = nn.Linear(8 * 36, 3)

    def forward(self, x):
        return self.head(self.first(x).reshape(-1, 8 * 36))


def mlp(inputs=6, hidden=16, classes=5):
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes))
'''


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def nets(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The module above, imported under a name that no artifact can find it by."""
    file = tmp_path_factory.mktemp("nets") / "nets.py"
    file.write_text(NETS)
    spec = importlib.util.spec_from_file_location("nets_of_the_tests", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def code() -> dict[str, bytes]:
    return {"nets.py": NETS.encode()}


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(32, 1, 8, 8)


@pytest.fixture
def sequences() -> torch.Tensor:
    return torch.randn(8, 7, 6)


@pytest.fixture
def fresh_process(tmp_path: Path) -> Callable[[str], str]:
    """Run Python source in a new process, from an empty folder; what it prints."""

    def run(source: str) -> str:
        folder = tmp_path / "elsewhere"
        folder.mkdir(exist_ok=True)
        done = subprocess.run([sys.executable, "-c", source], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
