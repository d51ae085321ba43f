"""How far `compress` gets a CNN of width 32 on 5,000 MNIST digits, beside the same CNN in eager fp32 on one thread.

For each seed one pipeline trains the CNN and searches chains: pruned at several sparsities and trained on with the CNN
as teacher, then int8, calibrated or learned in training. Of the front, two models are looked at: that with the best
validation accuracy among those that keep to the size and latency of a target.

Prints one JSON line: for each target means over SEEDS of size, latency at batch 1 (measured in turns with the CNN) and
drop of accuracy on validation and test, and the values of each seed. Targets: <= 0.035 of the size and <= 0.12 of the
latency at a drop <= 0.003; <= 0.01 of the size at a drop <= 0.01.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pieces import take

SEEDS = 3
TARGETS = {"small": {"size": 0.035, "latency": 0.12}, "smallest": {"size": 0.01, "latency": 1.0}}
USER_CODE = [Path(__file__).parents[2] / "pipelines" / "mnist.py", Path(__file__).parent / "tasks" / "cnn.py"]
TAUGHT = {"distillation.alpha": 0.9, "distillation.temperature": 4.0}
PASSES = [
    {
        "prune": {
            "sparsity": {"choice": [0.7, 0.75, 0.8, 0.85, 0.88]},
            "finetune_epochs": 20,
            "optimizer.lr": 0.003,
            **TAUGHT,
        }
    },
    {
        "quantize": {
            "method": {"choice": ["static", {"value": "qat", "space": {"finetune_epochs": 6, **TAUGHT}}]},
            "calibration_samples": 512,
        }
    },
]
COMPRESS = {"max_drop": {"val_accuracy": 0.02}, "passes": PASSES, "trials": 18}


def measure(seed: int) -> list[dict[str, Any]]:
    """The front: for each model its chain and its figures beside those of the CNN."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in USER_CODE:
            shutil.copy(file, folder)
        task = {"model": "cnn:build_model", "data": "cnn:build_data", "metrics": ["cnn:accuracy"]}
        stages = [
            {"name": "train", "uses": "train", "config": {"epochs": 10, "scheduler": {"name": "cosine"}}},
            {"name": "small", "uses": "compress", "inputs": {"model": "train"}, "config": COMPRESS},
        ]
        pipeline = folder / "pipeline.yaml"
        pipeline.write_text(json.dumps({"name": "cnn", "task": task, "seed": seed, "stages": stages}))
        done = subprocess.run(
            [sys.executable, "-m", "heliostat.cli", "run", str(pipeline), "--json"],
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        small = next(node for node in json.loads(done.stdout)["nodes"] if node["name"] == "small")
        record = json.loads(Path(small["path"], "record.json").read_text())
    base, *front = record["details"]["table"]
    return [
        {
            "chain": row["model"],
            "size": row["size_ratio"],
            "latency": 1 / row["speed_up"],
            "val_drop": base["metrics"]["val_accuracy"] - row["metrics"]["val_accuracy"],
            "test_drop": base["metrics"]["test_accuracy"] - row["metrics"]["test_accuracy"],
            "test_accuracy": row["metrics"]["test_accuracy"],
        }
        for row in front
    ]


def best(front: list[dict[str, Any]], limits: Mapping[str, float]) -> dict[str, Any]:
    """The best by validation of those within the limits; without any, the one that is least beyond."""
    within = [row for row in front if all(row[name] <= limit for name, limit in limits.items())]
    if within:
        return min(within, key=lambda row: (row["val_drop"], row["size"]))
    return min(front, key=lambda row: sum(max(0.0, row[name] / limit - 1) for name, limit in limits.items()))


def main() -> None:
    fronts = list(take({f"seed {seed}": partial(measure, seed) for seed in range(SEEDS)}).values())
    figures: dict[str, Any] = {"benchmark": "compression"}
    for target, limits in TARGETS.items():
        found = [best(front, limits) for front in fronts]
        means = {name: statistics.mean(row[name] for row in found) for name in found[0] if name != "chain"}
        rounded = {name: round(mean, 4) for name, mean in means.items()}
        figures[target] = {**rounded, "seeds": found}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
