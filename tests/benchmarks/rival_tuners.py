"""What Heliostat's search is compared with: Optuna and scikit-learn, as their own guides use them, on two cores.

`rival_tuners.py SIDE PIPELINE SEED` searches the space of a Heliostat pipeline until it is killed. Every side trains
with Heliostat's own loop, in processes of one thread, and writes the validation figure of every epoch that it trained,
with the time, to a file beside the pipeline: the best so far is known at every moment, also for methods that would
name it only at their end, and a figure of an epoch that is not a training's last one counts as well.

https://optuna.readthedocs.io/en/stable/tutorial/10_key_features/004_distributed.html
https://optuna.readthedocs.io/en/stable/reference/generated/optuna.pruners.HyperbandPruner.html
https://scikit-learn.org/stable/modules/grid_search.html
"""

import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator

PROCESSES = 2
MANY = 3000
"""More trials than any side comes to."""


@cache
def prepared(file: Path) -> dict[str, Any]:
    """The search of a pipeline, in a process that is ready to train for it."""
    from heliostat.core.imports import use_root
    from heliostat.training.isolation import fresh_process_state

    use_root(file.parent)
    fresh_process_state(num_threads=1)
    document = json.loads(file.read_text())
    return {"task": document["task"], **document["stages"][0]["config"]}


def train(
    file: Path, params: Mapping[str, Any], *, epochs: int, seed: int, stop: Callable[[int, float], bool]
) -> list[float]:
    """Train with `params` for so many epochs, or until `stop(epoch, figure)`; the figure of every epoch."""
    from heliostat.core.paths import overlay
    from heliostat.core.spec import Task
    from heliostat.training.config import TrainConfig
    from heliostat.training.run import run_training
    from heliostat.training.world import World

    search = prepared(file)
    figures = []

    def on_epoch(epoch: int, row: Mapping[str, float]) -> bool:
        figures.append(row[search["objective"]["metric"]])
        with (file.parent / f"figures-{os.getpid()}.txt").open("a") as log:
            log.write(f"{time.time()} {figures[-1]}\n")
        return stop(epoch, figures[-1])

    config = overlay(TrainConfig(**{**search["train"], "epochs": epochs}), params)
    run_training(Task(**search["task"]), config, world=World(), seed=seed, on_epoch=on_epoch, require_checkpoint=False)
    return figures


def best(figures: list[float], *, mode: str) -> float:
    return max(figures) if mode == "max" else min(figures)


# --- Optuna: TPE with the Hyperband pruner, one study shared by two processes ----------------------------------------


def optuna_process(file: Path, seed: int, rank: int) -> None:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    search = prepared(file)
    mode, epochs = search["objective"]["mode"], search["train"]["epochs"]

    def suggest(trial: optuna.Trial, path: str, kind: str, argument: Any) -> Any:
        match kind:
            case "choice":
                return trial.suggest_categorical(path, argument)
            case "randint":
                return trial.suggest_int(path, argument[0], argument[1] - 1)
            case _:
                return trial.suggest_float(path, *argument, log=kind == "loguniform")

    def objective(trial: optuna.Trial) -> float:
        params = {
            path: suggest(trial, path, *next(iter(dimension.items()))) for path, dimension in search["space"].items()
        }

        def stop(epoch: int, figure: float) -> bool:
            trial.report(figure, step=epoch)
            return trial.should_prune()

        figures = train(file, params, epochs=epochs, seed=seed + trial.number, stop=stop)
        if len(figures) < epochs:
            raise optuna.TrialPruned
        return best(figures, mode=mode)

    study = optuna.create_study(
        study_name="search",
        load_if_exists=True,
        storage=JournalStorage(JournalFileBackend(str(file.parent / "optuna.log"))),
        direction={"max": "maximize", "min": "minimize"}[mode],
        sampler=optuna.samplers.TPESampler(seed=2 * seed + rank),
        pruner=optuna.pruners.HyperbandPruner(min_resource=1, max_resource=epochs, reduction_factor=3),
    )
    study.optimize(objective)


def run_optuna(file: Path, seed: int) -> None:
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=optuna_process, args=(file, seed, rank)) for rank in range(PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


# --- scikit-learn: random search, and successive halving by epochs ---------------------------------------------------


class TorchModule(BaseEstimator):
    """The task's module as an estimator. Its data come from the task; its score is the best figure of its epochs."""

    def __init__(self, file: Path, epochs: int, seed: int, **space: Any):
        self.file, self.epochs, self.seed = file, epochs, seed
        self.space = space

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        return {"file": self.file, "epochs": self.epochs, "seed": self.seed, **self.space}

    def set_params(self, **params: Any) -> "TorchModule":
        self.epochs = params.pop("epochs", self.epochs)
        self.space = {**self.space, **params}
        return self

    def fit(self, rows: Any, targets: Any) -> "TorchModule":
        self.figures_ = train(
            self.file, self.space, epochs=self.epochs, seed=self.seed, stop=lambda epoch, figure: False
        )
        return self

    def score(self, rows: Any, targets: Any) -> float:
        mode = prepared(self.file)["objective"]["mode"]
        return best(self.figures_, mode=mode) * (1 if mode == "max" else -1)


def distributions(space: Mapping[str, Any]) -> dict[str, Any]:
    from scipy import stats

    def distribution(kind: str, argument: Any) -> Any:
        match kind:
            case "choice":
                return argument
            case "randint":
                return stats.randint(*argument)
            case "uniform":
                return stats.uniform(argument[0], argument[1] - argument[0])
            case "loguniform":
                return stats.loguniform(*argument)

    return {path: distribution(*next(iter(dimension.items()))) for path, dimension in space.items()}


NO_ROWS = {"X": np.zeros((2, 1)), "y": np.zeros(2)}
ONE_SPLIT = [([0], [1])]


def run_random(file: Path, seed: int) -> None:
    from sklearn.model_selection import RandomizedSearchCV

    search = prepared(file)
    RandomizedSearchCV(
        TorchModule(file, epochs=search["train"]["epochs"], seed=seed),
        distributions(search["space"]),
        n_iter=MANY,
        cv=ONE_SPLIT,
        refit=False,
        n_jobs=PROCESSES,
        random_state=seed,
    ).fit(**NO_ROWS)


def run_halving(file: Path, seed: int) -> None:
    """One halving after another, as each ends long before the time is over."""
    from sklearn.experimental import enable_halving_search_cv  # noqa: F401
    from sklearn.model_selection import HalvingRandomSearchCV

    search = prepared(file)
    for again in itertools.count():
        HalvingRandomSearchCV(
            TorchModule(file, epochs=1, seed=seed),
            distributions(search["space"]),
            resource="epochs",
            n_candidates="exhaust",
            min_resources=1,
            max_resources=search["train"]["epochs"],
            factor=3,
            cv=ONE_SPLIT,
            refit=False,
            n_jobs=PROCESSES,
            random_state=1000 * seed + again,
        ).fit(**NO_ROWS)


SIDES = {"optuna": run_optuna, "random": run_random, "halving": run_halving}

if __name__ == "__main__":
    import rival_tuners  # the processes of joblib import the estimator by this name

    rival_tuners.SIDES[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
