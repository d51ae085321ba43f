"""What a checkpoint after every epoch costs a training, at 50 MB of state: weights and Adam's two moments.

Two gloo processes of one thread train a multilayer perceptron with `ddp`; rank 0 writes. Trainings with and without
checkpoints alternate in the same processes, after one of each as warm-up. A training is timed from before its first
epoch until its last checkpoint is on the disk. The same is measured for one process. Prints one JSON line: the median
of the ratios of each pair, and all seconds an epoch. Target: less than 1.05.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WIDTH, LAYERS, SAMPLES, BATCH, EPOCHS, PAIRS = 1024, 4, 4096, 64, 3, 3
WORKERS = (1, 2)


def build_model() -> Any:
    """4.2 million parameters: 50.4 MB with Adam's state."""
    from torch import nn

    hidden = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, 10))


def epoch_s(folder: Path | None, rank: int, workers: int) -> float:
    """Seconds an epoch of a training that leaves checkpoints in `folder`, or none."""
    import torch
    from torch import nn
    from torch.utils.data import Subset, TensorDataset

    from heliostat.training.checkpoints import Checkpoints
    from heliostat.training.config import TrainConfig
    from heliostat.training.loop import fit
    from heliostat.training.task import Objective
    from heliostat.training.world import World

    data = TensorDataset(torch.randn(SAMPLES, WIDTH), torch.arange(SAMPLES) % 10)
    model = build_model()
    started = time.perf_counter()
    fit(
        model,
        {"train": data, "val": Subset(data, range(workers))},
        TrainConfig(epochs=EPOCHS, batch_size=BATCH, optimizer={"name": "adam", "lr": 1e-4}),
        objective=Objective(nn.functional.cross_entropy),
        seed=0,
        world=World(rank, workers),
        checkpoints=Checkpoints(folder) if folder is not None else None,
    )
    return (time.perf_counter() - started) / EPOCHS


def work(folder: str) -> None:
    """One of the processes, started by torchrun; rank 0 writes down the seconds of each pair."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, workers, seconds = dist.get_rank(), dist.get_world_size(), []
    for number in range(PAIRS + 1):
        with_checkpoints = epoch_s(Path(folder, f"checkpoints-{number}"), rank, workers)
        seconds.append([with_checkpoints, epoch_s(None, rank, workers)])
    if rank == 0:
        written = next(Path(folder, "checkpoints-0").iterdir())
        Path(folder, "figures.json").write_text(json.dumps([written.stat().st_size, seconds[1:]]))
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads now and then abort a process that ends in order


def measure(workers: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
        subprocess.run([*command, __file__, folder], check=True, stderr=subprocess.DEVNULL)
        size, pairs = json.loads(Path(folder, "figures.json").read_text())
    return {
        "ratio": round(statistics.median(kept / without for kept, without in pairs), 3),
        "checkpoint_mb": round(size / 1e6, 1),
        "epoch_s": [[round(seconds, 3) for seconds in pair] for pair in pairs],
    }


def main() -> None:
    print(json.dumps({"benchmark": "checkpoints", **{f"workers_{n}": measure(n) for n in WORKERS}}))


if __name__ == "__main__":
    work(sys.argv[1]) if len(sys.argv) > 1 else main()
