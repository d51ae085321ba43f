"""What a stage is: inert data (its name, what goes in, what comes out, its config model) and one function.

`@stage("quantize", inputs={"model": "model"}, output="model")` over `def quantize(context, config) -> StageResult`
registers it, and nothing else happens at import. A slot's kind may end in `?` (the input may be left out) or `*`
(the slot gathers every variant of every stage that it names; any other slot makes one node per variant), or in both.
"""

import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal, Protocol, get_type_hints

from heliostat.core.artifact import Artifact, Record
from heliostat.core.capacity import Need
from heliostat.core.carrier import HERE, Carrier
from heliostat.core.credentials import revealed
from heliostat.core.disk import writing_to
from heliostat.core.identity import fingerprint
from heliostat.core.imports import reference_to, resolve
from heliostat.core.model import Spec
from heliostat.core.spec import Resources, Task
from heliostat.errors import SpecError, nearest

SHELF = "shelf"
"""The name of a folder beside those of a stage's nodes."""
Place = Literal["driver", "task"]
Measured = Literal["later", "before", "together"]


class Reporter(Protocol):
    """Where a running stage says what is happening. Safe to call from any thread; never blocks, never raises."""

    def began(self, at: float | None = None) -> None:
        """The stage works, and waits no longer for CPUs or processes. Only the first call counts.

        `at` is when that was, in seconds since the epoch; now, unless given.
        """

    def metrics(self, values: Mapping[str, float], *, step: int, trial: str | None = None) -> None:
        """One row of metrics of epoch `step` (from 1), of the stage itself or of one of its trials."""

    def trial_started(self, trial: str, params: Mapping[str, Any]) -> None: ...

    def trial_ended(
        self,
        trial: str,
        status: Literal["done", "stopped", "failed"],
        *,
        metrics: Mapping[str, float],
        best_epoch: int = 0,
        seconds: float | None = None,
        reason: str | None = None,
    ) -> None:
        """`metrics` are those of the epoch `best_epoch`; `seconds` is how long the trial worked."""

    def progress(self, **fields: Any) -> None:
        """What the live view shows of the stage: `done`, `total`, `running`, `best` and the like."""

    def warn(self, text: str) -> None:
        """One line that a person should know although the stage goes on: on the terminal, in MLflow, in the record."""


class Unheard:
    """A reporter that nobody listens to."""

    def began(self, at: float | None = None) -> None: ...
    def metrics(self, values: Mapping[str, float], *, step: int, trial: str | None = None) -> None: ...
    def trial_started(self, trial: str, params: Mapping[str, Any]) -> None: ...
    def trial_ended(
        self,
        trial: str,
        status: Literal["done", "stopped", "failed"],
        *,
        metrics: Mapping[str, float],
        best_epoch: int = 0,
        seconds: float | None = None,
        reason: str | None = None,
    ) -> None: ...
    def progress(self, **fields: Any) -> None: ...
    def warn(self, text: str) -> None: ...


@dataclass(frozen=True)
class StageContext:
    """All that a stage function is given besides its config."""

    node: str
    """The node's name, such as `prune[sparsity=0.5]`."""
    folder: Path
    """The node's own folder. What an interrupted run left in it is still there."""
    root: Path
    """The folder of the pipeline file, where the user's modules are."""
    task: Task
    seed: int
    resources: Resources
    inputs: Mapping[str, tuple[Artifact, ...]]
    reporter: Reporter
    retries: int = 0
    """How often a process of the stage that died is started again. The runner does so for a stage that is a task."""
    carrier: Carrier = field(default=HERE, compare=False)
    """For a stage that starts processes on other machines itself: what they bring and leave files by."""
    cancel: threading.Event | None = field(default=None, compare=False)
    """Set when the run is being stopped. Only stages that run in the driver have it; a task is cancelled whole."""

    @property
    def shelf(self) -> Path:
        """A folder that nodes of the stage share if the same goes into them: for what is named by its content. It goes
        when the stage is forced, or has run in a plan where that goes into none of them. Nothing in it is part of an
        artifact.
        """
        return shelf_in(self.folder.parent, (a.record.fingerprint for group in self.inputs.values() for a in group))

    def one(self, slot: str) -> Artifact:
        """The single artifact in `slot`."""
        (artifact,) = self.inputs[slot]
        return artifact


def shelf_in(folder: Path, made_from: Iterable[str]) -> Path:
    """The shelf, in a stage's folder, of its nodes into which the nodes with these fingerprints go."""
    return folder / SHELF / fingerprint({"made_from": sorted(set(made_from))})


@dataclass(frozen=True)
class Validated:
    """What the weights that a stage kept gave on `val` while they were in memory."""

    figures: Mapping[str, float]
    """The row of the epoch that was kept: `val_loss`, `val_accuracy`, and whatever else."""
    layers: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """The marks of each layer for the first batch (`training/marks.py`), by which the first that is apart is found."""
    by_own_loop: bool = False
    """Whether the figures are what `task.train_fn` reported."""


@dataclass(frozen=True)
class StageResult:
    """What a stage function returns. The files it wrote into `context.folder` and names here are the artifact."""

    files: Sequence[str]
    """Relative names of the files that make up the artifact. Everything else in the folder is deleted."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    """What the stage decided, as JSON values: the best parameters of a search, the merged config of a training run."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Anything else worth keeping in the record, as JSON values: a table of trials, a table of candidates.

    `history`, where there is one, is a row of metrics per epoch.
    """
    validated: Validated | None = None
    """Of a stage that trains: the saved model must give the same figures when it is loaded, else the stage fails."""


@dataclass(frozen=True)
class Slot:
    """An input of a stage kind."""

    kind: str
    optional: bool = False
    many: bool = False

    @staticmethod
    def parse(text: str) -> "Slot":
        return Slot(text.rstrip("?*"), optional="?" in text, many="*" in text)


@dataclass(frozen=True)
class ConfigView:
    """What a stage kind's `check` may look at: nothing runs, the user's functions are imported but never called."""

    task: Task
    functions: Mapping[str, Callable[..., Any]]
    """The user's functions by their place in the task: `model`, `data`, `loss`, …"""
    inputs: Mapping[str, Sequence[tuple["StageKind", Spec]]]
    """The kind and the config of the nodes in each slot."""
    resources: Resources
    root: Path
    """The folder of the pipeline file, from which relative paths in a config lead."""


Check = Callable[[Any, ConfigView], Iterable[str]]
"""Yields what is wrong with a config, each as `place in the config: what`."""


@dataclass(frozen=True)
class StageKind:
    """A kind of stage. `version` is part of identity: raise it when the same config would give another result."""

    name: str
    function: Callable[[StageContext, Any], StageResult]
    config: type[Spec]
    inputs: Mapping[str, Slot]
    output: str
    version: int
    place: Place
    """`task`: runs in a Ray worker, side by side with others. `driver`: drives Ray itself, from the driver."""
    needs: Callable[[Resources], Need]
    """The CPUs and GPUs without which the stage can never run."""
    workload: Callable[[Any], Mapping[str, int]]
    """What `plan` says of the work ahead, such as `{"trials": 16, "epochs": 4}`."""
    check: Check
    identity: Callable[[Any, ConfigView], Mapping[str, Any]]
    """What of a config is part of identity: all of it, but for a file that it names the content and not the place."""
    params_used: "ParamsUsed"
    """The parameters that a node works with, once its inputs are there: what it inherits from them included."""
    explain: Callable[[Any, ConfigView], Mapping[str, str]]
    """What `plan` says of how a config will be carried out, by place. It may call the user's model function."""
    keeps_metrics: bool
    """The model is one that was measured already, so its metrics are the result's own."""
    measured: Measured
    """When the speed of the models that go in is measured: `later` (the stage does not look at it, and need not wait),
    `before` it starts, or `together`, in one measurement of all of them, so that they can be compared."""
    preload: Callable[[Resources], Sequence[str]]
    """Modules of the driver's part that take long to import: they are imported while Ray starts."""
    call_up: Callable[[Path, Resources], None] | None
    """Starts the processes of a node before it can begin; given its folder, or that of a stage with one node."""
    works_apart: Callable[[Resources], bool]
    """Whether its processes get on by the context's carrier where machines do not see one folder; a task's do."""
    reference: str

    @property
    def is_built_in(self) -> bool:
        return self.reference.startswith(_BUILT_IN)

    def call(self, context: StageContext, config: Any) -> "StageResult":
        """Run the stage. One of the user's own is given the passwords that its config hides."""
        if not self.is_built_in:
            config = type(config).model_validate(revealed(config.model_dump(mode="json", exclude_unset=True)))
        return self.function(context, config)


_KINDS: dict[str, StageKind] = {}
_BUILT_IN = "heliostat.stages."
ENTRY_POINTS = "heliostat.stages"

F = Callable[[StageContext, Any], StageResult]
ParamsUsed = Callable[[Any, Mapping[str, Sequence[Record]]], Mapping[str, Any]]
"""From a config, and the records of what goes in by slot."""


def stage(
    name: str,
    *,
    inputs: Mapping[str, str] | None = None,
    output: str,
    version: int = 1,
    place: Place = "task",
    needs: Callable[[Resources], Need] = lambda resources: Need(1, resources.per_worker),
    workload: Callable[[Any], Mapping[str, int]] = lambda config: {},
    check: Check = lambda config, view: (),
    identity: Callable[[Any, ConfigView], Mapping[str, Any]] = lambda config, view: config.identity(),
    params_used: ParamsUsed = lambda config, inputs: config.model_dump(mode="json"),
    explain: Callable[[Any, ConfigView], Mapping[str, str]] = lambda config, view: {},
    keeps_metrics: bool = False,
    measured: Measured = "before",
    preload: Callable[[Resources], Sequence[str]] = lambda resources: (),
    call_up: Callable[[Path, Resources], None] | None = None,
    works_apart: Callable[[Resources], bool] | None = None,
) -> Callable[[F], F]:
    """Declare a stage kind over `function(context, config) -> StageResult`; `config` is annotated with its model."""

    def register(function: F) -> F:
        hints = get_type_hints(function)
        config = next((hint for key, hint in hints.items() if key == "config"), None)
        if not (isinstance(config, type) and issubclass(config, Spec)):
            raise SpecError(
                f"stage {name!r}: annotate the argument `config` of {function.__name__} with a subclass of Spec"
            )
        reference = reference_to(function)
        slots = {slot: Slot.parse(text) for slot, text in (inputs or {}).items()}
        kind = StageKind(
            name=name,
            function=function,
            config=config,
            inputs=slots,
            output=output,
            version=version,
            place=place,
            needs=needs,
            workload=workload,
            check=check,
            identity=identity,
            params_used=params_used,
            explain=explain,
            keeps_metrics=keeps_metrics,
            measured=measured,
            preload=preload,
            call_up=call_up,
            works_apart=works_apart or (lambda resources: place == "task"),
            reference=reference,
        )
        function.__stage_kind__ = kind  # type: ignore[attr-defined]
        if kind.is_built_in:
            _KINDS[name] = kind
        return function

    return register


def built_in_kind(uses: str) -> StageKind | None:
    """The built-in kind of that name, if there is one."""
    return _KINDS.get(uses)


def find_kind(uses: str) -> StageKind:
    """The kind that `uses` names: a built-in, an entry point of the group `heliostat.stages`, or `module:function`.

    Raises SpecError when there is none, or when an entry point shadows a built-in.
    """
    installed = _installed_kinds(tuple(sys.path))
    for name in installed:
        if name in _KINDS:
            raise SpecError(
                f"the installed package {installed[name].value!r} may not shadow the built-in stage {name!r}"
            )
    if uses in _KINDS:
        return _KINDS[uses]
    if uses in installed:
        return _kind_of(resolve(f"{installed[uses].module}:{installed[uses].attr}"), uses)
    if ":" in uses:
        return _kind_of(resolve(uses), uses)
    raise SpecError(f"unknown stage kind {uses!r}{nearest(uses, [*_KINDS, *installed])}")


@lru_cache(maxsize=1)
def _installed_kinds(path: tuple[str, ...]) -> Mapping[str, EntryPoint]:
    """The entry points by name. They are read once for an import path: that means opening a file of every package."""
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def _kind_of(function: Any, uses: str) -> StageKind:
    kind = getattr(function, "__stage_kind__", None)
    if not isinstance(kind, StageKind):
        raise SpecError(f"{uses!r} is not a stage; put @stage(...) over the function")
    if kind.name in _KINDS:
        raise SpecError(f"{uses!r} calls itself {kind.name!r}, but may not shadow the built-in stage of that name")
    return kind


def call_stage(reference: str, context: StageContext, config: Mapping[str, Any]) -> StageResult:
    """Run the stage function that `reference` names: how a stage starts in another process."""
    context.reporter.began()
    kind: StageKind = resolve(reference).__stage_kind__
    with writing_to(context.folder):
        return kind.call(context, kind.config.model_validate(config))


def kind_of_config(config: type[Spec]) -> str:
    """The `uses` of the built-in whose config model this is. Raises SpecError when several or none have it."""
    found = [kind.name for kind in _KINDS.values() if kind.config is config]
    if len(found) != 1:
        raise SpecError(f"{config.__name__} does not tell the kind of stage; say uses=...")
    return found[0]
