"""What a tracked one-worker trial costs besides its own work: a trivial objective with 9 reports, SQLite, 2 CPUs.

A whole `heliostat.run` (Ray, search, MLflow delivered) of FEW trials and one of MANY; the difference of their wall
times per trial is the cost of one, the rest is start-up. Prints one JSON line. Target: trial_s <= 0.12.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FEW, MANY, REPORTS = 20, 200, 9
TASK = """
import torch
from torch.utils.data import TensorDataset

def build_model():
    return torch.nn.Linear(2, 2)

def build_data():
    rows = TensorDataset(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long))
    return {"train": rows, "val": rows}

def train_fn(context, config):
    for epoch in range(1, config.epochs + 1):
        context.report({"val_loss": config.optimizer.lr + 1 / epoch})
"""


def wall_s(trials: int) -> float:
    """The wall time of a whole run with so many trials, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "trivial.py").write_text(TASK)
        pipeline = {
            "name": "trivial",
            "task": {"model": "trivial:build_model", "data": "trivial:build_data", "train_fn": "trivial:train_fn"},
            "stages": [
                {
                    "name": "search",
                    "uses": "tune",
                    "config": {
                        "algorithm": "random",
                        "trials": trials,
                        "space": {"optimizer.lr": {"loguniform": [1e-4, 1e-1]}},
                        "objective": {"metric": "val_loss"},
                        "train": {"epochs": REPORTS},
                    },
                }
            ],
        }
        file = Path(folder, "trivial.yaml")
        file.write_text(json.dumps(pipeline))
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "heliostat.cli", "run", str(file), "--json"],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return time.perf_counter() - start


def main() -> None:
    few, many = wall_s(FEW), wall_s(MANY)
    trial_s = (many - few) / (MANY - FEW)
    figures = {
        "benchmark": "trials",
        "trials": MANY,
        "reports": REPORTS,
        "trial_s": round(trial_s, 4),
        "start_up_s": round(few - FEW * trial_s, 1),
        "wall_s": {str(FEW): round(few, 1), str(MANY): round(many, 1)},
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
