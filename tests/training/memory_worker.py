"""Two workers that train a model under `ddp`: `python memory_worker.py MODEL OPTIMIZER RANK FOLDER`.

Rank 0 leaves in `FOLDER/figures.json` how much the process grew at most, and what was estimated, in megabytes.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from heliostat.training.checkpoints import Checkpoints
from heliostat.training.config import TrainConfig
from heliostat.training.loop import Fit, fit
from heliostat.training.task import Objective
from heliostat.training.world import World

WORKERS = 2
STATUS = Path("/proc/self/status")
RESET_PEAK = ("/proc/self/clear_refs", "5")


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 256)
        layer = nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4)
        self.head = nn.Linear(256, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.encoder(self.embedding(tokens)).mean(dim=1))
        return outputs


def mlp() -> nn.Module:
    hidden = [layer for _ in range(3) for layer in (nn.Linear(1536, 1536), nn.ReLU())]
    return nn.Sequential(nn.Linear(1024, 1536), nn.ReLU(), *hidden, nn.Linear(1536, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()),
        *(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 10)),
    )


MODELS = {
    "mlp": (mlp, lambda: torch.randn(256, 1024)),
    "cnn": (cnn, lambda: torch.randn(64, 3, 48, 48)),
    "transformer": (Transformer, lambda: torch.randint(0, 1000, (64, 48))),
}


def memory_mb(field: str) -> float:
    """What the kernel says of this process: `VmRSS` is now, `VmHWM` the most since it was reset."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


def train(model: nn.Module, inputs: Tensor, optimizer: str, world: World, folder: Path) -> Fit:
    """Two epochs of two steps, with checkpoints."""
    targets = torch.zeros(len(inputs), dtype=torch.long)
    data = {"train": TensorDataset(inputs, targets), "val": TensorDataset(inputs[:4], targets[:4])}
    config = TrainConfig(epochs=2, batch_size=len(inputs) // 2, optimizer={"name": optimizer})
    objective = Objective(nn.functional.cross_entropy)
    return fit(model, data, config, objective=objective, seed=0, world=world, checkpoints=Checkpoints(folder))


def main(name: str, optimizer: str, rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=WORKERS)
    world = World(rank, WORKERS)
    small = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 8))
    train(small, torch.randn(8, 3, 8, 8), optimizer, world, folder / "first")  # what torch loads, in both layouts
    build, make_inputs = MODELS[name]
    inputs = make_inputs()
    before = memory_mb("VmRSS")
    Path(RESET_PEAK[0]).write_text(RESET_PEAK[1])
    found = train(build(), inputs, optimizer, world, folder / "kept")
    (row,) = found.choice["memory"]
    if rank == 0:
        figures = {"measured": memory_mb("VmHWM") - before, "estimated": row["total_mb"], **row}
        (folder / "figures.json").write_text(json.dumps(figures))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
    os._exit(0)  # gloo's threads now and then abort a process that ends in order
