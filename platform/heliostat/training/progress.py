"""How far a training run has come, which epoch is its best, and where an interrupted one goes on."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from heliostat.training.checkpoints import Checkpoints, State
from heliostat.training.task import Mode
from heliostat.training.world import World, from_first_worker

OnEpoch = Callable[[int, Mapping[str, float]], bool | None]
"""Called as `on_epoch(epoch, row)` on every worker; True on any of them ends the training."""

OnBest = Callable[[int, dict[str, Tensor], dict[str, Tensor]], None]
"""Called as `on_best(epoch, weights, loss_state)`; the tensors, on CPU, are the callee's own. The weights are named as
in the user's model; the loss has a state only where training changes it."""


OnCheckpoint = Callable[[Mapping[str, float], Mapping[str, Any]], None]
"""Called as `on_checkpoint(row, weights)`."""


@dataclass(frozen=True)
class Fit:
    """What a training run came to."""

    state: dict[str, Tensor]
    """The best epoch's weights, on CPU, named as in the user's model."""
    epoch: int
    """The best epoch, from 1."""
    metrics: dict[str, float]
    """The best epoch's row."""
    history: list[dict[str, float]]
    """One row per epoch."""
    validations: list[dict[str, float]]
    """One row per validation within an epoch, with the optimizer `step`, from 1, after which it was."""
    epochs: int
    seconds: float
    """Time spent on the epochs of the history, interruptions left out."""
    layers: Mapping[str, list[float]] = field(default_factory=dict)
    """The best epoch's marks of each layer (`marks.py`), where they were taken."""
    choice: Mapping[str, Any] = field(default_factory=dict)
    """The strategy that `auto` took, why, and the memory that it was weighed by, as JSON values."""
    loss_state: dict[str, Tensor] = field(default_factory=dict)
    """The best epoch's state of the task's loss, on CPU, where training changed it."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """What was done otherwise than the config says, and why, for the record's details."""


@dataclass
class Progress:
    """Where a fit stands; what a checkpoint holds beside the weights and the optimizer."""

    epoch: int = 0
    best_epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    """Optimizer steps, over all epochs."""
    validations: list[dict[str, float]] = field(default_factory=list)
    layers: dict[str, list[float]] = field(default_factory=dict)

    def fit(
        self,
        *,
        state: dict[str, Tensor],
        choice: Mapping[str, Any],
        loss_state: dict[str, Tensor] | None = None,
        notes: Mapping[str, str] | None = None,
    ) -> Fit:
        """The result of a run that has ended, `state` being its best epoch's."""
        return Fit(
            state=state,
            epoch=self.best_epoch,
            metrics=dict(self.history[self.best_epoch - 1]),
            history=self.history,
            validations=self.validations,
            epochs=self.epoch,
            seconds=sum(row["seconds"] for row in self.history),
            layers=self.layers,
            choice=choice,
            loss_state=loss_state or {},
            notes=notes or {},
        )


def is_better(value: float, past: Sequence[float], mode: Mode) -> bool:
    """Whether a figure beats all before it. Not a number is worse than any; the first is the best so far."""

    def score(figure: float) -> float:
        return -math.inf if math.isnan(figure) else figure if mode == "max" else -figure

    return not past or score(value) > max(map(score, past))


def read_on_first_worker(checkpoints: Checkpoints | None, *, world: World) -> tuple[State, State] | None:
    """The state to go on from and its best epoch's, the same on every worker, or None.

    Should the newest checkpoint's best be damaged, its elder best is the place to go on from: it is its own best.
    """
    if checkpoints is None:
        return None
    found: tuple[State, State] | None = None
    if world.rank == 0:
        latest, best = checkpoints.latest(), checkpoints.best()
        if latest is not None and best is not None:
            same = latest["progress"]["best_epoch"] == best["progress"]["epoch"]
            found = (latest if same else best, best)
    result: tuple[State, State] | None = from_first_worker(found, world=world)
    return result
