"""Which trials go on: a scheduler of Ray decides; here are its epochs, its memory, and what it decided by.

A trial waits for a verdict at each epoch of `compared_at`. It is compared by results with the keys `epoch` and `value`.
What ended trials showed is entered after an interruption, as if they had just run; a trial that begins anew is compared
anew.
"""

import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from heliostat.core.objective import Mode
from heliostat.runtime.journal import Judged, TrialRecord


@dataclass(frozen=True)
class AshaSettings:
    """Asynchronous successive halving (Li et al., 2020, https://arxiv.org/abs/1810.05934), in its stopping form.

    A trial that reaches a rung goes on only if it is among the best `1 / reduction_factor` of those that reached it
    before. The rungs are `grace_epochs`, and each time `reduction_factor` times as many.
    """

    grace_epochs: int
    reduction_factor: int


@dataclass(frozen=True)
class MedianSettings:
    """The median stopping rule (Golovin et al., 2017, https://research.google/pubs/pub46180/).

    After any epoch from `grace_epochs` on, a trial ends whose best value so far is worse than the median of what the
    others, `min_trials` or more, had on average from `grace_epochs` up to that epoch.
    """

    grace_epochs: int
    min_trials: int


Settings = AshaSettings | MedianSettings


class Scheduler(FIFOScheduler):  # type: ignore[misc]
    """Comes before one of Ray's schedulers in a class: tells it what it may know, and keeps what it decided."""

    compared_at: tuple[int, ...]
    """The epochs after which a trial waits for a verdict; the last one is none."""
    _judged: Judged | None = None

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        super().on_trial_add(tune_controller, trial)
        self._forget(trial)  # it is added again when it begins anew

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: Mapping[str, Any]) -> str:
        if "epoch" not in result:
            return str(TrialScheduler.CONTINUE)
        shown = {"epoch": result["epoch"], "value": result["value"]}
        cut = self._cut(trial, shown["epoch"])
        decision: str = super().on_trial_result(tune_controller, trial, shown)
        stopped = decision == TrialScheduler.STOP
        self._judged = Judged(trial.config["trial"], shown["epoch"], self._value(trial, shown), cut, stopped)
        return decision

    def take_verdict(self) -> Judged | None:
        """What was decided about the latest result, once."""
        judged, self._judged = self._judged, None
        return judged

    def remember(self, trials: Iterable[TrialRecord], *, metric: str) -> None:
        """Enter what ended trials showed, as if they had just run."""
        for trial in trials:
            for epoch, value in self._shown_by(trial, metric):
                self._enter(trial.id, epoch, value)

    def _shown_by(self, trial: TrialRecord, metric: str) -> Iterator[tuple[int, float]]:
        values = {epoch: row[metric] for epoch, row in trial.history if not math.isnan(row.get(metric, math.nan))}
        last = None if trial.status == "failed" else max(values, default=None)
        return ((epoch, value) for epoch, value in values.items() if epoch in self.compared_at or epoch == last)

    @abstractmethod
    def _cut(self, trial: Trial, epoch: int) -> float | None:
        """What the trial must not be worse than at this epoch; None when there is nothing to compare it with."""

    @abstractmethod
    def _value(self, trial: Trial, shown: Mapping[str, Any]) -> float:
        """What of the trial is held against the cut."""

    @abstractmethod
    def _enter(self, trial: str, epoch: int, value: float) -> None: ...

    @abstractmethod
    def _forget(self, trial: Trial) -> None: ...


class Asha(Scheduler, ASHAScheduler):  # type: ignore[misc]
    """Ray's ASHA of one bracket, whose rungs are epochs."""

    def __init__(self, settings: AshaSettings, *, epochs: int, mode: Mode) -> None:
        super().__init__(
            time_attr="epoch",
            metric="value",
            mode=mode,
            max_t=epochs,
            grace_period=min(settings.grace_epochs, epochs),
            reduction_factor=settings.reduction_factor,
        )
        (self._bracket,) = self._brackets
        self._rungs: dict[int, dict[str, float]] = dict(self._bracket._rungs)
        """By epoch, the values of the trials that reached it; high is good whatever the mode."""
        self.compared_at = tuple(sorted(epoch for epoch in self._rungs if epoch < epochs))

    def _cut(self, trial: Trial, epoch: int) -> float | None:
        cut = self._bracket.cutoff(self._rungs[epoch])
        return None if cut is None else float(self._metric_op * cut)

    def _value(self, trial: Trial, shown: Mapping[str, Any]) -> float:
        return float(shown["value"])

    def _enter(self, trial: str, epoch: int, value: float) -> None:
        self._bracket.on_result(SimpleNamespace(trial_id=trial), epoch, self._metric_op * value)

    def _forget(self, trial: Trial) -> None:
        for recorded in self._rungs.values():
            recorded.pop(trial.trial_id, None)


class Median(Scheduler, MedianStoppingRule):  # type: ignore[misc]
    """Ray's median stopping rule, looked at after every epoch."""

    def __init__(self, settings: MedianSettings, *, epochs: int, mode: Mode) -> None:
        super().__init__(
            time_attr="epoch",
            metric="value",
            mode=mode,
            grace_period=settings.grace_epochs,
            min_samples_required=settings.min_trials,
            min_time_slice=math.inf,  # a trial never makes room for another: it could not be taken up again
        )
        self._means: dict[Trial, dict[int, float]] = defaultdict(dict)
        self.compared_at = tuple(range(1, epochs))  # its best value so far may be from before the grace was over

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: Mapping[str, Any]) -> None:
        """Ray's own enters the last result of a stopped trial twice, and chokes on that of a failed one."""
        known = self._results[trial][-1]["epoch"] if trial in self._results else 0
        if result.get("epoch", 0) > known:
            self._results[trial].append({"epoch": result["epoch"], "value": result["value"]})

    def _running_mean(self, trial: Trial, epoch: int) -> float:
        """Each once: Ray asks for that of every other trial at every result, and those of epochs gone by stay."""
        known = self._means[trial]
        if epoch not in known:
            known[epoch] = super()._running_mean(trial, epoch)
        return known[epoch]

    def _cut(self, trial: Trial, epoch: int) -> float | None:
        others = [other for other in self._trials_beyond_time(epoch) if other != trial]
        means = [mean for mean in (self._running_mean(other, epoch) for other in others) if np.isfinite(mean)]
        return float(np.median(means)) if len(means) >= self._min_samples_required else None

    def _value(self, trial: Trial, shown: Mapping[str, Any]) -> float:
        return float(self._best_result(trial))

    def _enter(self, trial: str, epoch: int, value: float) -> None:
        self._results[trial].append({"epoch": epoch, "value": value})

    def _forget(self, trial: Trial) -> None:
        self._results.pop(trial, None)
        self._means.pop(trial, None)


def make_scheduler(settings: Settings, *, epochs: int, mode: Mode) -> Scheduler:
    """For trials of at most so many epochs."""
    if isinstance(settings, AshaSettings):
        return Asha(settings, epochs=epochs, mode=mode)
    return Median(settings, epochs=epochs, mode=mode)


@dataclass(frozen=True)
class Rung:
    """What happened at one epoch, over all trials of a search."""

    epoch: int
    reached: int
    stopped: int
    lowest_cut: float | None
    """The least of the cuts that trials were really held against there; None where none had others to compare with."""
    highest_cut: float | None


def rung_table(trials: Sequence[TrialRecord], *, epochs: Iterable[int]) -> list[Rung]:
    """A row for each of these epochs."""
    table = []
    for epoch in epochs:
        verdicts = [verdict for trial in trials for verdict in trial.verdicts if verdict.epoch == epoch]
        cuts = [verdict.cut for verdict in verdicts if verdict.cut is not None]
        reached = sum(trial.epochs >= epoch for trial in trials)
        stopped = sum(verdict.stopped for verdict in verdicts)
        table.append(Rung(epoch, reached, stopped, min(cuts, default=None), max(cuts, default=None)))
    return table
