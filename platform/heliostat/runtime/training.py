"""Trials that train, and are compared by the figures of their epochs."""

import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from heliostat.core.paths import overlay
from heliostat.core.space import Space
from heliostat.core.stage import Unheard
from heliostat.runtime.engines import Engine
from heliostat.runtime.work import Conditions, OnEpoch, Trial, Warn, one_process
from heliostat.training.config import TrainConfig


@dataclass(frozen=True)
class TrainedWork:
    """What the kinds of work have in common that train by `train`, with the trial's parameters laid over it."""

    train: TrainConfig

    def engine(self, engine: Engine, space: Space, *, seed: int) -> Engine:
        return engine

    @property
    def epochs(self) -> int:
        return self.train.epochs

    def shortest(self) -> Self:
        return replace(self, train=self.train.model_copy(update={"epochs": 1, "steps_per_epoch": 1}))

    def data_args(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        mine = {path: value for path, value in params.items() if path.startswith("data_args.")}
        return overlay(TrainConfig(data_args=self.train.data_args), mine).data_args


@dataclass(frozen=True)
class Training(TrainedWork):
    """Trainings in place, or in several workers.

    With `folds` a trial is cross-validated on parts of the training split, the same for all, and its figures are means.
    """

    folds: int | None = None
    judged_each_epoch = True

    def do(self, trial: Trial, conditions: Conditions, *, on_epoch: OnEpoch, warn: Warn) -> None:
        config = overlay(self.train, trial.params)
        if conditions.resources.workers_per_trial > 1:
            _train_together(trial, conditions, config, _Bridge(on_epoch, warn))
            return
        with one_process(trial, conditions, *self.train.code_references):
            self._train_here(trial, conditions, config, on_epoch)

    def _train_here(self, trial: Trial, conditions: Conditions, config: TrainConfig, on_epoch: OnEpoch) -> None:
        import torch

        from heliostat.training.folds import cross_validate, cut_folds
        from heliostat.training.run import run_training
        from heliostat.training.world import World

        task, seed = conditions.task, trial.seed
        world = World(0, 1, torch.device("cuda" if conditions.resources.gpus_per_worker else "cpu"))
        data = None if task.train_fn else conditions.data(config.data_args)
        if data is None or self.folds is None:
            run_training(task, config, world=world, seed=seed, on_epoch=on_epoch, require_checkpoint=False, data=data)
        else:
            folds = cut_folds(data, folds=self.folds, seed=conditions.seed)
            cross_validate(task, config, folds, world=world, seed=seed, on_epoch=on_epoch)


def _train_together(trial: Trial, conditions: Conditions, config: TrainConfig, bridge: "_Bridge") -> None:
    """Through Ray Train, whose rows arrive in a thread of their own; a verdict to stop goes back the same way."""
    from heliostat.runtime.placement import free
    from heliostat.runtime.trainer import train_workers

    folder = conditions.folder_of(trial.id)
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted search left: its rows must all come again
    free(folder)  # the process died that began the trial
    resources = conditions.resources
    try:
        train_workers(
            conditions.task,
            config,
            resources=resources.model_copy(update={"workers": resources.workers_per_trial, "max_workers": None}),
            seed=trial.seed,
            root=conditions.root,
            folder=folder,
            reporter=bridge,
            cancel=bridge.stopping,
            retries=conditions.retries,
            data=conditions.shared,
        )
    except KeyboardInterrupt:  # the verdict was to stop
        pass
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if bridge.error is not None:
        raise bridge.error


class _Bridge(Unheard):
    """A reporter that hands each row to `on_epoch`, and each warning to `warn`."""

    def __init__(self, on_epoch: OnEpoch, warn: Warn) -> None:
        self._on_epoch, self._warn = on_epoch, warn
        self.stopping = threading.Event()
        self.error: Exception | None = None

    def warn(self, text: str) -> None:
        self._warn(text)

    def metrics(self, values: Mapping[str, float], *, step: int, trial: str | None = None) -> None:
        try:
            if self._on_epoch(step, values):
                self.stopping.set()
        except Exception as error:
            self.error = error
            self.stopping.set()
