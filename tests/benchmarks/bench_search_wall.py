"""The wall time of a search against the bare arithmetic in it: a CNN on 5,000 MNIST digits, 16 TPE trials, ASHA.

After the search, the same trials are trained once more for as many epochs each, by the same loop, in two plain
processes that take one trial after another: no Ray, no tracking, no search. Their imports, and reading the data, are
over before the clock starts. Of the search, two times are stated: `search_s` is the stage, from asking Ray for its
first process to the record on disk, so the start of the trial processes and their import of torch are in it, and
starting Ray is not; `process_s` is the whole command.

Prints one JSON line: medians over SEEDS and all values. Target: ratio = search_s / arithmetic_s <= 1.25.
"""

import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from pieces import take

SEEDS, PROCESSES = 3, 2
TASK = {"model": "cnn:build_model", "data": "cnn:build_data", "metrics": ["cnn:accuracy"]}
TRAIN = {"epochs": 4, "batch_size": 64}
SEARCH = {
    "algorithm": "bayesian",
    "trials": 16,
    "space": {"optimizer.lr": {"loguniform": [1e-4, 1e-1]}, "model_args.width": {"choice": [8, 16, 32]}},
    "objective": {"metric": "val_accuracy"},
    "scheduler": "asha",
    "train": TRAIN,
}
USER_CODE = [Path(__file__).parents[2] / "pipelines" / "mnist.py", Path(__file__).parent / "tasks" / "cnn.py"]


def measure(seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in USER_CODE:
            shutil.copy(file, folder)
        stage = {"name": "search", "uses": "tune", "config": SEARCH}
        pipeline = folder / "pipeline.yaml"
        pipeline.write_text(json.dumps({"name": "cnn", "task": TASK, "seed": seed, "stages": [stage]}))

        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "heliostat.cli", "run", str(pipeline), "--json"],
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        process_s = time.perf_counter() - start
        (node,) = json.loads(done.stdout)["nodes"]
        trials = json.loads(Path(node["path"], "trials.json").read_text())
        arithmetic = [(trial["params"], trial["epochs"]) for trial in trials]
        return {
            "arithmetic_s": round(arithmetic_s(folder, arithmetic, seed=seed), 2),
            "search_s": round(node["seconds"], 2),
            "process_s": round(process_s, 2),
            "epochs": sum(trial["epochs"] for trial in trials),
            "val_accuracy": node["metrics"]["val_accuracy"],
        }


def arithmetic_s(folder: Path, trials: list[tuple[dict[str, Any], int]], *, seed: int) -> float:
    """The wall time of PROCESSES processes that train every (parameters, epochs) of `trials`, in order."""
    spawn = multiprocessing.get_context("spawn")
    todo, ready = spawn.Queue(), spawn.Barrier(PROCESSES + 1)
    for item in [*trials, *[None] * PROCESSES]:
        todo.put(item)
    processes = [spawn.Process(target=train, args=(folder, todo, ready, seed)) for _ in range(PROCESSES)]
    for process in processes:
        process.start()
    ready.wait()
    start = time.perf_counter()
    for process in processes:
        process.join()
    return time.perf_counter() - start


def train(folder: Path, todo: Any, ready: Any, seed: int) -> None:
    from heliostat.core.imports import use_root
    from heliostat.core.paths import overlay
    from heliostat.core.spec import Task
    from heliostat.training.config import TrainConfig
    from heliostat.training.isolation import fresh_process_state
    from heliostat.training.run import run_training
    from heliostat.training.task import build_data
    from heliostat.training.world import World

    use_root(folder)
    fresh_process_state(num_threads=1)
    task = Task(**TASK)
    build_data(task, {})  # kept for all trainings of the process
    ready.wait()
    while (item := todo.get()) is not None:
        params, epochs = item
        config = overlay(TrainConfig(**TRAIN), params, place="")
        run_training(
            task,
            config,
            world=World(),
            seed=seed,
            on_epoch=lambda epoch, row: epoch == epochs,  # noqa: B023
            require_checkpoint=False,
        )


def main() -> None:
    taken = take({f"seed {seed}": partial(measure, seed) for seed in range(SEEDS)})
    values = list(taken.values())
    medians = {what: statistics.median(v[what] for v in values) for what in ("arithmetic_s", "search_s", "process_s")}
    ratios = [value["search_s"] / value["arithmetic_s"] for value in values]
    whole = [value["process_s"] / value["arithmetic_s"] for value in values]
    figures = {
        "benchmark": "search_wall",
        **medians,
        "ratio": round(statistics.median(ratios), 3),
        "process_ratio": round(statistics.median(whole), 3),
        "values": taken,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
