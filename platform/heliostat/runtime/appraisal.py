"""What a trial's model is measured for when trials are compared, besides the figures of every epoch.

Its passes make of the best weights so far what the pipeline would make of them if training ended there. They run at the
epochs at which trials are compared and at the last one, and that model's figures stand in the row of that epoch under
the names that the objectives have; those of the model in training end in `_plain`, in every row.

Without passes only what the model costs is measured, which its training does not change: once, for all rows.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from heliostat.core.paths import overlay
from heliostat.runtime.gate import Gate, gate_of_this_node
from heliostat.runtime.training import TrainedWork
from heliostat.runtime.work import Conditions, OnEpoch, Trial, Warn, one_process
from heliostat.training.config import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor

    from heliostat.training.task import Data


class Measure(Protocol):
    """From weights, and the row of their epoch, to figures.

    It calls `give_way` now and then, and times the model within `alone`.
    """

    def __call__(
        self,
        weights: "dict[str, Tensor]",
        *,
        loss_state: "dict[str, Tensor]",
        validated: Mapping[str, float],
        config: TrainConfig,
        data: "Data",
        give_way: Callable[[], None],
        alone: Callable[[], AbstractContextManager[None]],
    ) -> dict[str, float]: ...


@dataclass(frozen=True)
class Appraisal(TrainedWork):
    """Trainings whose models are measured. One worker each."""

    measure: Measure
    compresses: bool
    """Whether it makes another model of the trial's, with figures of its own on `val`."""
    code_references: tuple[str, ...] = ()
    """Of the user's code that only the passes use."""
    judged_each_epoch = False

    def do(self, trial: Trial, conditions: Conditions, *, on_epoch: OnEpoch, warn: Warn) -> None:
        config = overlay(self.train, trial.params)
        with one_process(trial, conditions, *self.train.code_references, *self.code_references):
            self._train(trial, conditions, config, on_epoch)

    def _train(self, trial: Trial, conditions: Conditions, config: TrainConfig, on_epoch: OnEpoch) -> None:
        import torch

        from heliostat.training.run import run_training
        from heliostat.training.world import World

        data = conditions.data(config.data_args)
        with gate_of_this_node() as gate, gate.at_work():
            appraiser = Appraiser(
                self, on_epoch, config=config, data=data, compared_at=conditions.compared_at, gate=gate
            )
            run_training(
                conditions.task,
                config,
                world=World(0, 1, torch.device("cuda" if conditions.resources.gpus_per_worker else "cpu")),
                seed=trial.seed,
                data=data,
                on_epoch=appraiser.epoch,
                on_best=appraiser.best,
                after_step=lambda model: gate.give_way(),
            )


class Appraiser:
    """Stands between the training of one trial and `on_epoch`, and completes the rows."""

    def __init__(
        self,
        appraisal: Appraisal,
        on_epoch: OnEpoch,
        *,
        config: TrainConfig,
        data: "Data",
        compared_at: Sequence[int],
        gate: Gate,
    ) -> None:
        self._appraisal, self._on_epoch, self._gate = appraisal, on_epoch, gate
        self._config, self._data, self._compared_at = config, data, compared_at
        self._best_epoch = 0
        self._weights: dict[str, Tensor] = {}
        self._loss_state: dict[str, Tensor] = {}
        self._best_row: Mapping[str, float] = {}
        self._figures: dict[str, float] | None = None
        """Of these weights; None while they are not measured."""

    def best(self, epoch: int, weights: "dict[str, Tensor]", loss_state: "dict[str, Tensor]") -> None:
        """An epoch is the best so far."""
        self._best_epoch, self._weights, self._loss_state = epoch, weights, loss_state
        if self._appraisal.compresses:
            self._figures = None

    def epoch(self, epoch: int, row: Mapping[str, float]) -> bool:
        if epoch == self._best_epoch:
            self._best_row = row
        if not self._appraisal.compresses:
            complete = {**row, **self._measured()}
        else:
            complete = plain(row)
            if epoch in self._compared_at or self._is_last(epoch):
                complete |= self._measured()
        with self._gate.at_rest():
            return self._on_epoch(epoch, complete)

    def _is_last(self, epoch: int) -> bool:
        return epoch == self._config.epochs or self._config.gives_up(epoch, best_epoch=self._best_epoch)

    def _measured(self) -> dict[str, float]:
        if self._figures is None:
            self._figures = self._appraisal.measure(
                self._weights,
                loss_state=self._loss_state,
                validated=self._best_row,
                config=self._config,
                data=self._data,
                give_way=self._gate.give_way,
                alone=self._gate.alone,
            )
        return self._figures


def plain(row: Mapping[str, float]) -> dict[str, float]:
    """The row with the figures on `val` marked as those of the model in training."""
    from heliostat.training.phases import TIMES

    return {f"{name}_plain" if name.startswith("val_") and name not in TIMES else name: row[name] for name in row}
