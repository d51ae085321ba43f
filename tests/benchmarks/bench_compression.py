"""How far `compress` gets a CNN of width 32 on 5,000 MNIST digits, beside the same CNN in eager fp32 on one thread.

For each seed one pipeline trains the CNN and searches chains: pruned as far as a scan of its layers says, at several
sparsities, and trained on with the CNN as teacher; then int8, calibrated or learned in training, in all layers or only
where the weights are. Of the front, two models are looked at: the best on validation among those that keep to the size
and latency of a target.

Prints one JSON line: for each target means over SEEDS of size, latency at batch 1 (measured in turns with the CNN) and
drop of accuracy on validation and test, and the values of each seed. Targets: <= 0.035 of the size and <= 0.12 of the
latency at a drop <= 0.003; <= 0.01 of the size at a drop <= 0.01. The seeds can be taken side by side:

    taskset -c 0,1 python bench_compression.py --keep FILE --only "seed 0" &
    taskset -c 2,3 python bench_compression.py --keep FILE --only "seed 1" &
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
TASK = {"model": "cnn:build_jittered_model", "data": "cnn:build_data", "metrics": ["cnn:accuracy"]}
TRAIN: dict[str, Any] = {
    "epochs": 20,
    "optimizer": {"lr": 0.002},
    "scheduler": {"name": "cosine"},
    "monitor": "val_loss",  # of 500 digits two epochs often get as many right
}
TAUGHT = {"distillation.alpha": 0.9, "distillation.temperature": 4.0}
SCANNED = {"sensitivity.levels": {"choice": [[0.25, 0.5, 0.75, 0.85, 0.92]]}}
PASSES: list[dict[str, Any]] = [
    {
        "prune": {
            "sparsity": {"choice": [0.75, *({"value": sparsity, "space": SCANNED} for sparsity in (0.8, 0.84, 0.86))]},
            "finetune_epochs": 80,
            "optimizer.lr": 0.006,
            **TAUGHT,
        }
    },
    {
        "quantize": {
            "method": {
                "choice": [
                    {"value": "static", "space": {"skip": {"choice": [[], ["*/Conv"]]}}},
                    {"value": "qat", "space": {"finetune_epochs": 10, "optimizer.lr": 0.001, **TAUGHT}},
                ]
            },
            "calibration_samples": 512,
        }
    },
]
COMPRESS = {"max_drop": {"val_accuracy": 0.02}, "passes": PASSES, "trials": 20}


def measure(seed: int) -> dict[str, Any]:
    """The CNN's accuracy, and the front: for each model its chain and its figures beside those of the CNN."""
    with tempfile.TemporaryDirectory() as name:
        return told(compressed(Path(name), seed))


def told(nodes: Mapping[str, Any]) -> dict[str, Any]:
    """What `measure` gives, of nodes that are done."""
    record = json.loads(Path(nodes["small"]["path"], "record.json").read_text())
    base, *front = record["details"]["table"]
    return {
        "test_accuracy": base["metrics"]["test_accuracy"],
        "seconds": {name: node["seconds"] for name, node in nodes.items()},
        "front": [
            {
                "chain": row["model"],
                "size": row["size_ratio"],
                "latency": 1 / row["speed_up"],
                "val_drop": base["metrics"]["val_accuracy"] - row["metrics"]["val_accuracy"],
                "val_loss": row["metrics"]["val_loss"],
                "test_drop": base["metrics"]["test_accuracy"] - row["metrics"]["test_accuracy"],
                "test_accuracy": row["metrics"]["test_accuracy"],
            }
            for row in front
        ],
    }


def compressed(folder: Path, seed: int) -> dict[str, dict[str, Any]]:
    """Run the pipeline in `folder`; its nodes, `train` and `small`."""
    for file in USER_CODE:
        shutil.copy(file, folder)
    at_once = len(os.sched_getaffinity(0))  # Ray counts the CPUs of the machine, whichever of them we are held to
    stages = [
        {"name": "train", "uses": "train", "config": TRAIN},
        {
            "name": "small",
            "uses": "compress",
            "inputs": {"model": "train"},
            "config": COMPRESS,
            "resources": {"max_concurrent_trials": at_once},
        },
    ]
    pipeline = folder / "pipeline.yaml"
    pipeline.write_text(json.dumps({"name": "cnn", "task": TASK, "seed": seed, "stages": stages}))
    done = subprocess.run(
        [sys.executable, "-m", "heliostat.cli", "run", str(pipeline), "--json"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return {node["name"]: node for node in json.loads(done.stdout)["nodes"]}


def best(front: list[dict[str, Any]], limits: Mapping[str, float]) -> dict[str, Any]:
    """The best by validation of those within the limits; without any, the one that is least beyond."""
    within = [row for row in front if all(row[name] <= limit for name, limit in limits.items())]
    if within:
        return min(within, key=lambda row: (row["val_drop"], row["val_loss"]))
    return min(front, key=lambda row: sum(max(0.0, row[name] / limit - 1) for name, limit in limits.items()))


def main() -> None:
    taken = list(take({f"seed {seed}": partial(measure, seed) for seed in range(SEEDS)}).values())
    figures: dict[str, Any] = {
        "benchmark": "compression",
        "test_accuracy": [seed["test_accuracy"] for seed in taken],
        "seconds": [seed["seconds"] for seed in taken],
    }
    for target, limits in TARGETS.items():
        found = [best(seed["front"], limits) for seed in taken]
        means = {name: statistics.mean(row[name] for row in found) for name in found[0] if name != "chain"}
        rounded = {name: round(mean, 4) for name, mean in means.items()}
        figures[target] = {**rounded, "seeds": found}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
