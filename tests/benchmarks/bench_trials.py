"""What a tracked one-worker trial costs besides its own work: a trivial objective with 9 reports, SQLite, 2 CPUs.

Each measurement is a process with so many trials. MLflow's database then tells when each trial ended: the cost of a
trial is the time from the end of an early one (start-up is over by then) to the end of the last, by the trials between.
Beside Heliostat run Ray Tune as its guide to MLflow writes it (a default `Tuner`, `MLflowLoggerCallback`), with fewer
trials as each takes seconds, and Optuna in one process with SQLite storage and an MLflow run for every trial, which
keeps the last of the 9 reports only. All import the same module of the user's.

Prints one JSON line: medians of REPETITIONS and all values. Targets: trial_s <= 0.08; growth <= 1.15 (the cost of a
trial in a search of 2,000 by that in one of 200); driver_kb_per_trial <= 25 (resident memory of the process that
searches, from the end of the 200th trial to that of the 2,000th); ray_tune_ratio >= 20; optuna_ratio >= 1.

https://docs.ray.io/en/latest/tune/examples/tune-mlflow.html
https://optuna.readthedocs.io/en/stable/tutorial/20_recipes/001_rdb.html
"""

import json
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from pieces import take

REPORTS, REPETITIONS = 9, 3
SEARCHES = [("heliostat", 200), ("heliostat", 2000), ("optuna", 200), ("ray_tune", 24)]
EARLY = {"heliostat": 20, "optuna": 20, "ray_tune": 4}
"""The trial at whose end the clock starts."""
SAMPLE_S = 0.05
TASK = """
import torch
from torch.utils.data import TensorDataset

def build_model():
    return torch.nn.Linear(2, 2)

def build_data():
    rows = TensorDataset(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long))
    return {"train": rows, "val": rows}

def value(lr, epoch):
    return lr + 1 / epoch

def train_fn(context, config):
    for epoch in range(1, config.epochs + 1):
        context.report({"val_loss": value(config.optimizer.lr, epoch)})
"""


def heliostat(trials: int, folder: Path) -> None:
    from heliostat.cli import main

    search = {
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
    task = {"model": "trivial:build_model", "data": "trivial:build_data", "train_fn": "trivial:train_fn"}
    file = folder / "trivial.yaml"
    file.write_text(json.dumps({"name": "trivial", "task": task, "stages": [search]}))
    sys.argv = ["heliostat", "run", str(file), "--json"]
    main()


def ray_tune(trials: int, folder: Path) -> None:
    from ray import tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    def objective(config: dict[str, Any]) -> None:
        import trivial

        for epoch in range(1, REPORTS + 1):
            tune.report({"val_loss": trivial.value(config["lr"], epoch)})

    tracking = MLflowLoggerCallback(tracking_uri=f"sqlite:///{folder}/mlflow.db", experiment_name="trivial")
    tune.Tuner(
        objective,
        param_space={"lr": tune.loguniform(1e-4, 1e-1)},
        tune_config=tune.TuneConfig(metric="val_loss", mode="min", num_samples=trials),
        run_config=tune.RunConfig(storage_path=str(folder), callbacks=[tracking]),
    ).fit()


def optuna(trials: int, folder: Path) -> None:
    import mlflow
    import optuna
    import trivial

    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    mlflow.set_experiment("trivial")

    def objective(trial: optuna.Trial) -> float:
        lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
        with mlflow.start_run():
            mlflow.log_param("lr", lr)
            for epoch in range(1, REPORTS + 1):
                loss = trivial.value(lr, epoch)
                trial.report(loss, step=epoch)
            mlflow.log_metric("val_loss", loss)
        return loss

    sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(storage=f"sqlite:///{folder}/optuna.db", sampler=sampler)
    study.optimize(objective, n_trials=trials)


def measure(side: str, trials: int) -> dict[str, Any]:
    """A search in a process of its own: seconds per trial, before and after the trials, and memory as it went."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "trivial.py").write_text(TASK)
        path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
        memory: list[tuple[float, float]] = []
        start = time.time()
        process = subprocess.Popen(
            [sys.executable, __file__, side, str(trials), folder],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        )
        while process.poll() is None:
            memory.append((time.time(), resident_mb(process.pid)))
            time.sleep(SAMPLE_S)
        end = time.time()
        assert process.returncode == 0, f"{side} with {trials} trials failed"
        ended = trial_ends(folder)[:trials]
    early = EARLY[side]
    return {
        "trial_s": round((ended[-1] - ended[early - 1]) / (trials - early), 5),
        "start_s": round(ended[0] - start, 2),
        "tail_s": round(end - ended[-1], 2),
        "mb": {
            str(count): next(mb for at, mb in memory if at >= ended[count - 1])
            for count in (200, 2000)
            if count <= trials
        },
        "peak_mb": max(mb for _, mb in memory),
    }


def resident_mb(pid: int) -> float:
    """Of a process that may have ended just now."""
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return round(int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def trial_ends(folder: str) -> list[float]:
    """When MLflow's runs ended, in order. The runs above the trials end last."""
    (database,) = Path(folder).rglob("mlflow.db")
    with sqlite3.connect(database) as db:
        rows = db.execute("SELECT end_time FROM runs WHERE end_time IS NOT NULL ORDER BY end_time")
        return [milliseconds / 1000 for (milliseconds,) in rows]


def main() -> None:
    taken = take(
        {
            f"{side} {trials} #{repetition}": partial(measure, side, trials)
            for repetition in range(REPETITIONS)  # in turns, so that a slow minute of the machine hits all alike
            for side, trials in SEARCHES
        }
    )
    runs = {
        (side, n): [taken[f"{side} {n} #{repetition}"] for repetition in range(REPETITIONS)] for side, n in SEARCHES
    }

    def median_trial_s(side: str, trials: int) -> float:
        return statistics.median(run["trial_s"] for run in runs[side, trials])

    few, many = median_trial_s("heliostat", 200), median_trial_s("heliostat", 2000)
    grown = [1024 * (run["mb"]["2000"] - run["mb"]["200"]) / 1800 for run in runs["heliostat", 2000]]
    figures = {
        "benchmark": "trials",
        "reports": REPORTS,
        "trial_s": few,
        "trial_at_2000_s": many,
        "growth": round(many / few, 3),
        "driver_kb_per_trial": round(statistics.median(grown), 1),
        "ray_tune_trials": 24,
        "ray_tune_trial_s": median_trial_s("ray_tune", 24),
        "ray_tune_ratio": round(median_trial_s("ray_tune", 24) / few, 1),
        "optuna_trial_s": median_trial_s("optuna", 200),
        "optuna_ratio": round(median_trial_s("optuna", 200) / few, 2),
        "values": taken,
    }
    print(json.dumps(figures))


SIDES = {"heliostat": heliostat, "ray_tune": ray_tune, "optuna": optuna}

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in SIDES:
        SIDES[sys.argv[1]](int(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
