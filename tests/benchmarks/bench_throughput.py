"""Steady training throughput of 2 workers, ours against a plain `torchrun` DDP script of the same model and data.

Both sides train the same convolutional net on the same synthetic images for EPOCHS epochs with 2 gloo processes of one
thread; the first epoch is warm-up and is left out. The plain script is timed twice: with whole tensors indexed by hand,
as ours does, and with a standard `DataLoader`. Rounds alternate, and the median ratio counts. Prints one JSON line.
Target: ratio >= 0.98 of the plain script with the same input path.
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

SAMPLES, BATCH, EPOCHS, WORKERS, ROUNDS = 2048, 64, 4, 2, 3
SIDES = ("ours", "tensors", "loader")


def build_model() -> Any:
    """A convolutional net of about 240,000 parameters."""
    from torch import nn

    layers = (nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU())
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 49, 64), nn.ReLU(), nn.Linear(64, 10))


def build_data() -> Any:
    """Noise of MNIST's shape."""
    import torch
    from torch.utils.data import TensorDataset

    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(SAMPLES, 1, 28, 28, generator=generator)
    return TensorDataset(inputs, torch.arange(SAMPLES) % 10)


def ours() -> float:
    """Samples a second of our loop, validation left out."""
    import torch
    from torch import nn
    from torch.utils.data import Subset

    from heliostat.training.config import TrainConfig
    from heliostat.training.loop import fit
    from heliostat.training.task import Objective
    from heliostat.training.world import World

    data = build_data()
    world = World(int(os.environ["RANK"]), WORKERS)
    result = fit(
        build_model(),
        {"train": data, "val": Subset(data, range(WORKERS))},
        TrainConfig(epochs=EPOCHS, batch_size=BATCH, optimizer={"name": "sgd", "lr": 0.01}, strategy="ddp"),
        objective=Objective(nn.functional.cross_entropy),
        seed=torch.initial_seed() % 2**31,
        world=world,
    )
    return statistics.median(row["train_samples_per_s"] for row in result.history[1:])


def plain(loader: bool) -> float:
    """Samples a second of a loop as the DDP tutorial writes it, on the fast memory layout too."""
    import torch
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader, DistributedSampler

    data, rank = build_data(), int(os.environ["RANK"])
    model = DistributedDataParallel(build_model().to(memory_format=torch.channels_last), gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    sampler: Any = DistributedSampler(data, num_replicas=WORKERS, rank=rank)
    speeds = []
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        started = time.perf_counter()
        if loader:
            batches: Any = DataLoader(data, batch_size=BATCH // WORKERS, sampler=sampler)
        else:
            rows = torch.tensor(list(sampler)).split(BATCH // WORKERS)
            batches = (tuple(tensor[row] for tensor in data.tensors) for row in rows)
        for inputs, targets in batches:
            loss = nn.functional.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()  # as scripts do, to show it
        speeds.append(SAMPLES / (time.perf_counter() - started))
    return statistics.median(speeds[1:])


def work(side: str, folder: str) -> None:
    """One process of one side, started by torchrun."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    speed = ours() if side == "ours" else plain(loader=side == "loader")
    if dist.get_rank() == 0:
        Path(folder, side).write_text(str(speed))
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads now and then abort a process that ends in order


def samples_per_s(side: str) -> float:
    """What one side reaches, in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORKERS}"]
        subprocess.run([*command, __file__, side, folder], check=True)
        return float(Path(folder, side).read_text())


def main() -> None:
    rounds = [{side: samples_per_s(side) for side in SIDES} for _ in range(ROUNDS)]
    figures = {
        "benchmark": "throughput",
        "workers": WORKERS,
        "samples_per_s": {side: round(statistics.median(r[side] for r in rounds)) for side in SIDES},
        "ratio": round(statistics.median(r["ours"] / r["tensors"] for r in rounds), 3),
        "ratio_to_loader": round(statistics.median(r["ours"] / r["loader"] for r in rounds), 3),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    work(*sys.argv[1:]) if len(sys.argv) > 1 else main()
