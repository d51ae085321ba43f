"""How good a model a search has found after 60 s and 120 s of wall time, start-up included, on two cores.

Beside Heliostat (TPE with ASHA) search Optuna (TPE with its Hyperband pruner) and scikit-learn (`RandomizedSearchCV`,
and `HalvingRandomSearchCV` over and over): the same space, the same data, one thread for each of two processes, and the
same loop, which is faster than one around a `DataLoader` (`rival_tuners.py`). Of what that loop offers besides, only
Heliostat's side makes use: `ema_decay: 0.98`, a moving average of the weights. Without it no side finds more than
another beyond its own noise.

A run lasts 120 s from the start of its process; the best validation figure of any epoch of any trial that was known at
a moment is its figure for that moment, whatever the method would have said of itself.

- `mnist`: the CNN of `bench_search_wall.py`, by accuracy on 500 digits.
- `table`: `load_digits`, the largest table of real data that comes with scikit-learn, and a multilayer perceptron. By
  loss: accuracy is within two rows of 1 for every side.

Prints one JSON line: for each problem, moment and rival the share of SEEDS in which Heliostat's figure is at least as
good, and all values. Target: every share >= 0.8. An hour and a half: see `--keep` and `--minutes` in `pieces.py`.
"""

import json
import os
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from bench_search_wall import TASK, USER_CODE
from pieces import take

HERE = Path(__file__).parent
SEEDS, MOMENTS_S = 5, (60, 120)
TOLERANCE = 1e-9
LEARNING = {
    "optimizer.lr": {"loguniform": [1e-4, 1e-1]},
    "optimizer.weight_decay": {"loguniform": [1e-6, 1e-1]},
    "batch_size": {"choice": [32, 64, 128]},
}
PROBLEMS: dict[str, dict[str, Any]] = {
    "mnist": {
        "code": USER_CODE,
        "task": TASK,
        "objective": {"metric": "val_accuracy", "mode": "max"},
        "space": {**LEARNING, "model_args.width": {"choice": [8, 16, 32]}},
        "epochs": 9,
    },
    "table": {
        "code": [HERE / "tasks" / "table.py"],
        "task": {"model": "table:build_model", "data": "table:build_data", "metrics": ["table:accuracy"]},
        "objective": {"metric": "val_loss", "mode": "min"},
        "space": {
            **LEARNING,
            "model_args.width": {"choice": [32, 64, 128, 256]},
            "model_args.layers": {"randint": [1, 4]},
            "model_args.dropout": {"uniform": [0.0, 0.5]},
        },
        "epochs": 27,
    },
}
AVERAGED = {"ema_decay": 0.98}
RIVALS = ("optuna", "random", "halving")


def measure(problem: str, side: str, seed: int) -> dict[str, Any]:
    """The best figure at each moment, and how many epochs had been trained by then."""
    what = PROBLEMS[problem]
    config = {
        "algorithm": "bayesian",
        "trials": 3000,
        "space": what["space"],
        "objective": what["objective"],
        "scheduler": "asha",
        "train": {"epochs": what["epochs"], "optimizer": {"name": "adamw"}},
    }
    if side == "heliostat":
        config["train"] |= AVERAGED
    stage = {"name": "search", "uses": "tune", "config": config}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for code in what["code"]:
            shutil.copy(code, folder)
        file = folder / "pipeline.yaml"
        file.write_text(json.dumps({"name": problem, "task": what["task"], "seed": seed, "stages": [stage]}))
        command = [sys.executable, str(HERE / "rival_tuners.py"), side, str(file), str(seed)]
        if side == "heliostat":
            command = [sys.executable, "-m", "heliostat.cli", "run", str(file)]
        start = time.time()
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            process.wait(MOMENTS_S[-1])
            raise RuntimeError(f"{side} ended before its time, with {process.returncode}")
        except subprocess.TimeoutExpired:
            if side == "heliostat":
                process.send_signal(signal.SIGINT)
                process.wait()
            else:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        figures = tracked(folder, what["objective"]["metric"]) if side == "heliostat" else logged(folder)
    better = max if what["objective"]["mode"] == "max" else min
    known = {moment: [figure for at, figure in figures if at - start <= moment] for moment in MOMENTS_S}
    return {
        "best": {str(moment): better(known[moment]) for moment in MOMENTS_S},
        "epochs": {str(moment): len(known[moment]) for moment in MOMENTS_S},
        "first_s": round(min(at for at, _ in figures) - start, 1),
    }


def tracked(folder: Path, metric: str) -> list[tuple[float, float]]:
    with sqlite3.connect(folder / ".heliostat" / "mlflow.db") as db:
        rows = db.execute("SELECT timestamp, value FROM metrics WHERE key = ? AND NOT is_nan", (metric,))
        return [(milliseconds / 1000, value) for milliseconds, value in rows]


def logged(folder: Path) -> list[tuple[float, float]]:
    lines = [line for file in folder.glob("figures-*.txt") for line in file.read_text().splitlines()]
    return [(float(at), float(figure)) for at, figure in map(str.split, lines)]


def main() -> None:
    taken = take(
        {
            f"{problem} {side} #{seed}": partial(measure, problem, side, seed)
            for seed in range(SEEDS)
            for problem in PROBLEMS
            for side in ("heliostat", *RIVALS)
        }
    )

    def best(problem: str, side: str, moment: int) -> list[float]:
        return [taken[f"{problem} {side} #{seed}"]["best"][str(moment)] for seed in range(SEEDS)]

    def share(problem: str, rival: str, moment: int) -> float:
        """Of the seeds in which Heliostat is at least as good."""
        sign = 1 if PROBLEMS[problem]["objective"]["mode"] == "max" else -1
        pairs = zip(best(problem, "heliostat", moment), best(problem, rival, moment))
        return statistics.mean(sign * (ours - theirs) >= -TOLERANCE for ours, theirs in pairs)

    figures = {
        "benchmark": "search_quality",
        "share_at_least_as_good": {
            f"{problem} {moment} s": {rival: share(problem, rival, moment) for rival in RIVALS}
            for problem in PROBLEMS
            for moment in MOMENTS_S
        },
        "medians": {
            f"{problem} {moment} s": {
                side: round(statistics.median(best(problem, side, moment)), 4) for side in ("heliostat", *RIVALS)
            }
            for problem in PROBLEMS
            for moment in MOMENTS_S
        },
        "values": taken,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
