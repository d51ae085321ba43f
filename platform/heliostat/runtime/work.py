"""What the trials of a search do: one object for each kind, which travels to their processes once for all of them.

`training.py` has those that train and are compared by their epochs, `appraisal.py` those that are compared by what
their model is measured for, `making.py` those that make a model of another one. Nothing else knows which it is.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from heliostat.core.space import Space
from heliostat.core.spec import Resources, Task
from heliostat.core.stage import StageContext
from heliostat.runtime.engines import Engine
from heliostat.runtime.hang import NOTE, ended_if_it_hangs
from heliostat.runtime.shared_data import SharedData

if TYPE_CHECKING:
    from heliostat.training.task import Data

OnEpoch = Callable[[int, Mapping[str, float]], bool]
"""Told of an epoch, from 1, and its row. Waits for the verdict where trials are compared; True means stop."""
Warn = Callable[[str], None]


@dataclass(frozen=True)
class Trial:
    """What one of them is given to work with."""

    id: str
    params: Mapping[str, Any]
    seed: int


@dataclass(frozen=True)
class Conditions:
    """What all trials of a search have in common, whatever they do."""

    task: Task
    root: Path
    folder: Path
    """Where trials may leave what other processes look for."""
    resources: Resources
    seed: int
    """Of the search: what it decides is the same for every trial, so that they can be compared."""
    retries: int
    """How often a process that died is started again: the trial's own, or all its workers together."""
    metric: str
    """What trials are compared by first."""
    compared_at: tuple[int, ...] = ()
    """The epochs at which they are, before the last one."""
    shared: SharedData | None = None
    other_points: tuple[Mapping[str, Any], ...] = ()
    """Tried by a trial that fails before any has ended, to find out whether it is the task that does."""

    @staticmethod
    def of(context: StageContext, **more: Any) -> "Conditions":
        """Those of a stage, with the rest, or something else in their place."""
        names = ("task", "root", "folder", "resources", "seed", "retries")
        return Conditions(**{name: getattr(context, name) for name in names} | more)

    def hang_note(self, trial: str) -> Path:
        return self.folder / f".{trial}{NOTE}"

    def failure_note(self, trial: str) -> Path:
        """Where a trial leaves its reason while it tries other points."""
        return self.folder / f".{trial}.failed"

    def folder_of(self, trial: str) -> Path:
        """Where the workers of a trial work, if it has several."""
        return self.folder / "trials" / trial

    def data(self, data_args: Mapping[str, Any]) -> "Data":
        """What the task's function makes of the arguments: built here, unless it was for all trials."""
        from heliostat.training.task import build_data

        return (self.shared.read(data_args) if self.shared else None) or build_data(self.task, data_args)


class Work(Protocol):
    """What a trial does."""

    judged_each_epoch: bool
    """Each row has the metric that trials are compared by."""

    def engine(self, engine: Engine, space: Space, *, seed: int) -> Engine:
        """What leads a search for such work: the engine that the file asks for, or one around it."""

    @property
    def epochs(self) -> int:
        """How many a trial reports at most."""

    def data_args(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the data function will be given in a trial with these parameters, whether or not they make a config."""

    def shortest(self) -> "Work | None":
        """The same with one step of training; None where the work is no training, and cannot be cut short."""

    def do(self, trial: Trial, conditions: Conditions, *, on_epoch: OnEpoch, warn: Warn) -> None:
        """Carry out a trial. Whatever it raises is the trial's failure."""


@contextmanager
def one_process(trial: Trial, conditions: Conditions, *references: str) -> Iterator[None]:
    """Make this process one that has run no trial yet, and end it if it hangs.

    `references` are those of user code beside the task's.
    """
    from heliostat.training.isolation import as_if_first
    from heliostat.training.seeding import seed_everything

    resources = conditions.resources
    with ended_if_it_hangs(resources.hang_timeout_s, note=conditions.hang_note(trial.id)):
        everyone = [*conditions.task.references.values(), *references]
        as_if_first(conditions.root, everyone, num_threads=max(1, int(resources.cpus_per_worker)))
        seed_everything(trial.seed)
        yield
