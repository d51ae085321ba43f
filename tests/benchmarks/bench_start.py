"""From a command to its first optimizer step with 2 workers: ours on a Ray that runs, `torchrun`, and Ray Train.

All train the same small net with gloo and note when the first step is over. A Ray without a dashboard is started
beforehand, and every command of ours and of Ray Train connects to it; each runs once before the rounds that count. Ray
Train is as its guide writes it, with no switch of Ray's set. Sides take turns. Prints one JSON line: medians, all
values, and ours by torchrun's time to its first step and by the time of its whole command. Target: ratio <= 1.6.

https://docs.ray.io/en/latest/train/getting-started-pytorch.html
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

ROUNDS, WORKERS = 3, 2
TASK = '''
import os
import time

import torch
from torch import nn
from torch.utils.data import TensorDataset

def build_model():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

def build_data():
    rows = TensorDataset(torch.randn(256, 64), torch.arange(256) % 10)
    return {"train": rows, "val": rows, "test": rows}

steps = 0

def train_step(model, batch):
    """Called for the second time when the first step is over."""
    global steps
    steps += 1
    if steps == 2:
        stepped()
    return nn.functional.cross_entropy(model(batch[0]), batch[1])

def stepped():
    with open(STEPPED, "a") as file:
        file.write(f"{time.time()}\\n")
'''


def two_steps(model: Any) -> None:
    """The plain loop, up to where the first step is over."""
    import first
    import torch

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for batch in torch.utils.data.DataLoader(first.build_data()["train"], batch_size=32):
        optimizer.zero_grad()
        first.train_step(model, batch).backward()
        optimizer.step()
        if first.steps == 2:
            return


def torchrun() -> None:
    import first
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    two_steps(DistributedDataParallel(first.build_model()))
    dist.destroy_process_group()


def ray_train(address: str, folder: str) -> None:
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer, prepare_model

    def train_loop() -> None:
        import first

        two_steps(prepare_model(first.build_model()))

    ray.init(address=address, runtime_env={"working_dir": folder})
    scaling = ScalingConfig(num_workers=WORKERS)
    TorchTrainer(train_loop, scaling_config=scaling, run_config=RunConfig(storage_path=f"{folder}-ray")).fit()


def command_of(side: str, folder: Path, address: str) -> list[str]:
    match side:
        case "heliostat":
            return ["-m", "heliostat.cli", "run", str(folder / "first.yaml"), "--address", address]
        case "torchrun":
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORKERS}"]
            return [*launcher, __file__, "torchrun"]
        case _:
            return [__file__, "ray_train", address, str(folder)]


def measure(side: str, address: str) -> tuple[float, float]:
    """Seconds from the command to the first step of the last worker, and to the end of the command."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "project")
        folder.mkdir()
        stepped = Path(name, "stepped")
        (folder / "first.py").write_text(f"STEPPED = {str(stepped)!r}\n{TASK}")
        task = {"model": "first:build_model", "data": "first:build_data", "train_step": "first:train_step"}
        train = {
            "name": "train",
            "uses": "train",
            "config": {"epochs": 1, "batch_size": 64},
            "resources": {"workers": WORKERS},
        }
        (folder / "first.yaml").write_text(json.dumps({"name": "first", "task": task, "stages": [train]}))
        path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
        started = time.time()
        subprocess.run(
            [sys.executable, *command_of(side, folder, address)],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        )
        whole = time.time() - started
        return max(map(float, stepped.read_text().split()[:WORKERS])) - started, whole


def main() -> None:
    import ray

    sides = ("heliostat", "torchrun", "ray_train")
    context = ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    address = context.address_info["gcs_address"]
    rounds = [{side: measure(side, address) for side in sides} for _ in range(ROUNDS + 1)][1:]
    first = {side: statistics.median(taken[side][0] for taken in rounds) for side in sides}
    figures = {
        "benchmark": "start",
        "first_step_s": {side: round(seconds, 2) for side, seconds in first.items()},
        "ratio": round(first["heliostat"] / first["torchrun"], 2),
        "ratio_to_whole": round(first["heliostat"] / statistics.median(taken["torchrun"][1] for taken in rounds), 2),
        "ray_train_ratio": round(first["ray_train"] / first["torchrun"], 2),
        "values": [{side: [round(s, 2) for s in taken[side]] for side in sides} for taken in rounds],
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    SIDES = {"torchrun": torchrun, "ray_train": ray_train}
    SIDES[sys.argv[1]](*sys.argv[2:]) if len(sys.argv) > 1 else main()
