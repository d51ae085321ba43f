"""The process that runs trials one after another, each in a thread of its own.

Tune asks for a result and waits. An answer comes when the trial reaches a rung (the thread then waits for the verdict),
when it ends, and else about once a second with the rows so far, so that a driver can show them. One answer carries
many rows: a round trip through Tune costs more than a small epoch.

A trial that fails answers with its traceback and leaves the process as it is, for the next one.
"""

import json
import math
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune

from heliostat.core.imports import use_root
from heliostat.core.paths import overlay
from heliostat.core.spec import Resources, Task
from heliostat.core.stage import Unheard
from heliostat.errors import HeliostatError
from heliostat.runtime.appraisal import Appraisal, Appraiser, OnEpoch
from heliostat.runtime.gate import gate_of_this_node
from heliostat.runtime.hang import NOTE, ended_if_it_hangs, waiting
from heliostat.runtime.journal import Row
from heliostat.runtime.making import Making
from heliostat.runtime.shared_data import SharedData
from heliostat.runtime.tasks import own_traceback
from heliostat.training.config import TrainConfig

ANSWER_S = 1.0


@dataclass(frozen=True)
class TrialWork:
    """All that the trials of one search have in common."""

    task: Task
    train: TrainConfig
    folds: int | None
    fold_seed: int
    """Cuts the same folds for every trial, so that they can be compared."""
    metric: str
    rungs: tuple[int, ...]
    root: Path
    folder: Path
    resources: Resources
    data: SharedData | None
    retries: int
    """How often a process that died is started again: the trial's own, or all its workers together."""
    appraisal: Appraisal | None
    """What trials are compared by, where the figures of their epochs are not all."""
    making: Making | None = None
    """What trials do instead of training; `train` then says how the model was trained that they start from."""

    def hang_note(self, trial: str) -> Path:
        return self.folder / f".{trial}{NOTE}"


class BadTrialError(HeliostatError):
    """A trial whose objective is not a number, or that never reported it."""


class _StoppedError(Exception):
    """Unwinds a training loop that goes on although it was told to stop."""


class TrialRun:
    """One trial: the thread that trains, and the conversation with it."""

    def __init__(
        self, work: TrialWork, trial: str, params: Mapping[str, Any], seed: int, *, stop_at: int | None = None
    ) -> None:
        """With `stop_at` it ends after that epoch, however many there are."""
        self._work, self._stop_at = work, stop_at
        self._turn = threading.Condition()
        self._rows: list[Row] = []
        self._warnings: list[str] = []
        self._last: tuple[int, float] | None = None
        """The latest epoch and the objective there."""
        self._at_rung = False
        """The thread waits for a verdict."""
        self._told = False
        """The last answer said so: being asked again is the verdict to go on."""
        self._stopping = self._over = False
        self._reason: str | None = None
        self._thread = threading.Thread(
            target=self._train, args=(trial, params, seed), name=f"trial-{trial}", daemon=True
        )
        self._thread.start()

    def answer(self) -> dict[str, Any]:
        """The next result for Tune. Asking again after a rung is the verdict to go on."""
        with self._turn:
            if self._told:
                self._at_rung = False
                self._turn.notify_all()
            self._turn.wait_for(lambda: self._over or self._at_rung, timeout=ANSWER_S)
            result: dict[str, Any] = {"rows": self._rows, "warnings": self._warnings}
            if self._over:
                result |= {"done": True, "outcome": "failed" if self._reason else "done", "reason": self._reason}
            if self._last and not self._reason and (self._over or self._at_rung):
                result |= {"epoch": self._last[0], "value": self._last[1]}
            self._rows, self._warnings, self._told = [], [], self._at_rung
            return result

    def stop(self, *, wait: bool) -> None:
        """End the trial at its current epoch. With `wait`, return when nothing of it runs any more."""
        with self._turn:
            self._stopping, self._at_rung = True, False
            self._turn.notify_all()
        if wait:
            self._thread.join()

    def _on_epoch(self, epoch: int, metrics: Mapping[str, float]) -> bool:
        with self._turn:
            if self._stopping:
                raise _StoppedError
            value = metrics.get(self._work.metric)
            self._rows.append((epoch, dict(metrics)))
            if value is None and self._work.appraisal is None:
                raise BadTrialError(
                    f"nothing reports {self._work.metric!r}; what is reported: {', '.join(sorted(metrics))}"
                )
            if value is not None:
                if math.isnan(value):
                    raise BadTrialError(f"{self._work.metric} is not a number at epoch {epoch}")
                self._last = (epoch, value)
            if epoch in self._work.rungs and epoch < self._work.train.epochs:
                self._at_rung = True
                self._turn.notify_all()
                self._turn.wait_for(lambda: not self._at_rung)
            self._stopping |= epoch == self._stop_at
            return self._stopping

    def _warn(self, text: str) -> None:
        with self._turn:
            self._warnings.append(text)

    def _train(self, trial: str, params: Mapping[str, Any], seed: int) -> None:
        try:
            train_trial(self._work, trial, params, seed, self._on_epoch, self._warn)
        except _StoppedError:
            pass
        except HeliostatError as error:
            self._reason = str(error)
        except Exception as error:
            self._reason = own_traceback(error)
        with self._turn:
            self._over = True
            self._turn.notify_all()


def train_trial(
    work: TrialWork, trial: str, params: Mapping[str, Any], seed: int, on_epoch: OnEpoch, warn: Callable[[str], None]
) -> None:
    """Do a trial's work with `params`, from a state in which no earlier trial can be seen."""
    config = overlay(work.train, params) if work.making is None else work.train
    if work.making is None and work.resources.workers_per_trial > 1:
        _train_together(work, trial, config, seed, _Bridge(on_epoch, warn))
        return

    def on_row(epoch: int, row: Mapping[str, float]) -> bool:
        with waiting():  # for the verdict
            return on_epoch(epoch, row)

    with ended_if_it_hangs(work.resources.hang_timeout_s, note=work.hang_note(trial)):
        if work.making is not None:
            _make_here(work, work.making, params, seed, on_row, warn)
        else:
            _train_here(work, config, seed, on_row)


def _train_here(work: TrialWork, config: TrainConfig, seed: int, on_epoch: OnEpoch) -> None:
    import torch

    from heliostat.training.folds import cross_validate, cut_folds
    from heliostat.training.run import run_training
    from heliostat.training.task import build_data
    from heliostat.training.world import World

    _begin(work, work.appraisal.code_references if work.appraisal else (), seed)
    device = torch.device("cuda" if work.resources.gpus_per_worker else "cpu")
    world = World(0, 1, device)
    data = work.data.read(config.data_args) if work.data else None
    if work.folds is not None:
        whole = data or build_data(work.task, config.data_args)
        folds = cut_folds(whole, folds=work.folds, seed=work.fold_seed)
        cross_validate(work.task, config, folds, world=world, seed=seed, on_epoch=on_epoch)
    elif work.appraisal is not None:
        data = data or build_data(work.task, config.data_args)
        with gate_of_this_node() as gate, gate.at_work():
            appraiser = Appraiser(work.appraisal, on_epoch, config=config, data=data, compared_at=work.rungs, gate=gate)
            run_training(
                work.task,
                config,
                world=world,
                seed=seed,
                data=data,
                on_epoch=appraiser.epoch,
                on_best=appraiser.best,
                after_step=lambda model: gate.give_way(),
            )
    else:
        run_training(work.task, config, world=world, seed=seed, on_epoch=on_epoch, require_checkpoint=False, data=data)


def _make_here(
    work: TrialWork,
    making: Making,
    params: Mapping[str, Any],
    seed: int,
    on_epoch: OnEpoch,
    warn: Callable[[str], None],
) -> None:
    from heliostat.training.task import build_data

    _begin(work, making.code_references, seed)
    data_args = work.train.data_args
    data = (work.data.read(data_args) if work.data else None) or build_data(work.task, data_args)
    with gate_of_this_node() as gate, gate.at_work():
        figures = making.make(params, data=data, gate=gate, warn=warn)
    on_epoch(1, figures)


def _begin(work: TrialWork, references: Sequence[str], seed: int) -> None:
    """Make this process one that has run no trial yet; `references` are those of user code beside the task's."""
    from heliostat.training.isolation import as_if_first
    from heliostat.training.seeding import seed_everything

    everyone = [*work.task.references.values(), *work.train.code_references, *references]
    as_if_first(work.root, everyone, num_threads=max(1, int(work.resources.cpus_per_worker)))
    seed_everything(seed)


def _train_together(work: TrialWork, trial: str, config: TrainConfig, seed: int, bridge: "_Bridge") -> None:
    """Through Ray Train, whose rows arrive in a thread of their own; a verdict to stop goes back the same way."""
    from heliostat.runtime.trainer import train_workers

    folder = work.folder / "trials" / trial
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted search left: its rows must all come again
    resources = work.resources.model_copy(update={"workers": work.resources.workers_per_trial, "max_workers": None})
    try:
        train_workers(
            work.task,
            config,
            resources=resources,
            seed=seed,
            root=work.root,
            folder=folder,
            reporter=bridge,
            cancel=bridge.stopping,
            retries=work.retries,
            data=work.data,
        )
    except KeyboardInterrupt:  # the verdict was to stop
        pass
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if bridge.error is not None:
        raise bridge.error


class _Bridge(Unheard):
    """A reporter that hands each row to `on_epoch`, and each warning to `warn`."""

    def __init__(self, on_epoch: OnEpoch, warn: Callable[[str], None]) -> None:
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


class TrialActor(tune.Trainable):  # type: ignore[misc]
    """Tune's view of it. `work` is set on a subclass, which travels to the process once for all its trials."""

    work: TrialWork
    _trial: dict[str, Any]
    _run: TrialRun | None = None

    def setup(self, config: dict[str, Any]) -> None:
        use_root(self.work.root)
        self._trial = config

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._end(wait=True)
        self._trial = new_config
        return True

    def step(self) -> dict[str, Any]:
        if self._run is None:  # not before: Tune does not retry a trial whose process dies while it is being set up
            trial = self._trial
            self._run = TrialRun(self.work, trial["trial"], json.loads(trial["params"]), trial["seed"])
        return self._run.answer()

    def cleanup(self) -> None:
        self._end(wait=False)

    def _end(self, *, wait: bool) -> None:
        if self._run is not None:
            self._run.stop(wait=wait)
            self._run = None
