"""Asynchronous successive halving (ASHA; Li et al., 2020, https://arxiv.org/abs/1810.05934), in its stopping form.

A trial that reaches a rung (an epoch) goes on only if it is among the best `1 / reduction_factor` of those that reached
it before. Ray's scheduler decides; here are its rungs in epochs, and its memory after a resume.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

from ray.tune.schedulers import ASHAScheduler

from heliostat.runtime.journal import TrialRecord


@dataclass(frozen=True)
class AshaSettings:
    grace_epochs: int = 1
    """No trial is stopped before it has trained so long: the first rung."""
    reduction_factor: int = 3


def rungs(settings: AshaSettings, *, epochs: int) -> list[int]:
    """The epochs at which trials are compared, the first being `grace_epochs`."""
    grace = min(settings.grace_epochs, epochs)
    count = int(math.log(epochs / grace, settings.reduction_factor) + 1e-9) + 1
    return [grace * settings.reduction_factor**k for k in range(count)]


class Asha(ASHAScheduler):  # type: ignore[misc]
    """Ray's scheduler over results with the keys `epoch` and `value`."""

    def __init__(self, settings: AshaSettings, *, epochs: int, mode: Literal["max", "min"]) -> None:
        super().__init__(
            time_attr="epoch",
            metric="value",
            mode=mode,
            max_t=epochs,
            grace_period=min(settings.grace_epochs, epochs),
            reduction_factor=settings.reduction_factor,
        )

    def remember(self, trials: Iterable[TrialRecord], *, rungs: Iterable[int], metric: str) -> None:
        """Enter what ended trials showed at each rung and at their end, as if they had just run."""
        (bracket,) = self._brackets
        for trial in trials:
            values = [(epoch, row[metric]) for epoch, row in trial.history if not math.isnan(row.get(metric, math.nan))]
            shown = [(epoch, value) for epoch, value in values if epoch in rungs]
            last = [] if trial.status == "failed" else values[-1:]
            for epoch, value in [*shown, *last]:
                bracket.on_result(SimpleNamespace(trial_id=trial.id), epoch, self._metric_op * value)
