"""From a pipeline to a graph of planned nodes: expand, check, fingerprint, and look up what is done already.

A stage becomes one node for each combination of its matrix values and of the variants in its single-input slots; a slot
that gathers (`model*`) takes every variant. Everything is checked here, before anything starts: stage kinds, configs,
edges, and the user's functions, which are imported but never called.
"""

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from heliostat.core import imports
from heliostat.core.artifact import Artifact, Record, find_artifact, read_record, records
from heliostat.core.capacity import Capacity, amount
from heliostat.core.carrier import HERE, Carrier
from heliostat.core.identity import explain_change, fingerprint
from heliostat.core.integrity import damaged, lacking
from heliostat.core.model import Spec
from heliostat.core.paths import set_path, why_not_a_path
from heliostat.core.spec import Pipeline, Resources, Stage, Task
from heliostat.core.stage import ConfigView, Reporter, Slot, StageContext, StageKind, find_kind, shelf_in
from heliostat.core.validate import validate
from heliostat.errors import ArtifactError, ResourceError, SpecError, nearest


@dataclass(frozen=True, eq=False)
class Node:
    """A planned node. Its folder is `{storage}/{pipeline}/{stage}/{fingerprint}/`."""

    name: str
    stage: str
    uses: str
    kind: StageKind
    config: Spec
    inputs: Mapping[str, tuple["Node", ...]]
    resources: Resources
    retries: int
    identity: Mapping[str, Any]
    fingerprint: str
    folder: Path
    status: Literal["run", "reuse"] = "run"
    reason: str = ""
    explained: Mapping[str, str] = field(default_factory=dict)
    """How parts of the config will be carried out, such as `strategy`."""
    estimate_s: float | None = None
    """The seconds that the stage's last node took, when the store knows one."""
    unmeasured: bool = False
    """The model is there and reused, but a run was cut off before its speed was measured."""

    @property
    def has_speed(self) -> bool:
        """Whether it makes a model whose speed is to be measured."""
        return self.kind.output == "model" and not self.kind.keeps_metrics

    @property
    def upstream(self) -> list["Node"]:
        return list({node.name: node for nodes in self.inputs.values() for node in nodes}.values())

    @property
    def shelf(self) -> Path:
        """That of its stage's context."""
        return shelf_in(self.folder.parent, (node.fingerprint for node in self.upstream))


@dataclass(frozen=True)
class Plan:
    """The nodes in an order in which each comes after what it needs, and the task's functions by their place."""

    pipeline: Pipeline
    nodes: tuple[Node, ...]
    functions: Mapping[str, Callable[..., Any]]

    @property
    def fingerprint(self) -> str:
        """The identity of the whole run: of all its nodes together."""
        return fingerprint({"pipeline": self.pipeline.name, "nodes": {n.name: n.fingerprint for n in self.nodes}})

    def node(self, name: str) -> Node:
        return next(node for node in self.nodes if node.name == name)

    def context(
        self,
        node: Node,
        *,
        inputs: Mapping[str, tuple[Artifact, ...]],
        reporter: Reporter,
        cancel: threading.Event,
        carrier: Carrier = HERE,
    ) -> StageContext:
        """What the node's stage is given to work with."""
        return StageContext(
            node=node.name,
            folder=node.folder,
            root=self.pipeline.root,
            task=self.pipeline.task,
            seed=self.pipeline.seed,
            resources=node.resources,
            inputs=inputs,
            reporter=reporter,
            retries=node.retries,
            carrier=carrier,
            cancel=cancel,
        )


def plan_pipeline(
    pipeline: Pipeline, *, force: Sequence[str] = (), elsewhere: Mapping[Path, int] = MappingProxyType({})
) -> Plan:
    """The plan of a pipeline. Nodes of the stages in `force`, and those after them, run whatever the store has.

    `elsewhere` has the sizes of the files that can be fetched into the store, by their place in it. Raises SpecError
    that names the place, the value and the nearest right word.
    """
    known = [stage.name for stage in pipeline.stages]
    for name in force:
        if name not in known:
            raise SpecError(f"--force {name}: no stage {name!r}{nearest(name, known)}")
    imports.use_root(pipeline.root)
    functions = _import_task(pipeline.task)
    history = _History(pipeline, elsewhere)
    by_stage: dict[str, list[Node]] = {}
    for index, stage in enumerate(pipeline.stages):
        place = f"stages[{index}] ({stage.name})"
        nodes = list(_expand(pipeline, stage, place, by_stage, functions))
        _check_distinct(nodes, place)
        by_stage[stage.name] = [history.look_up(node, forced=stage.name in force) for node in nodes]
    return Plan(pipeline, tuple(node for nodes in by_stage.values() for node in nodes), functions)


def check_fits(plan: Plan, capacity: Capacity, *, where: str) -> None:
    """Raises ResourceError for a node that still has to run and needs more than `where` can ever give."""
    for node in plan.nodes:
        need = node.kind.needs(node.resources)
        if node.status == "run" and capacity.workers(need.each) < need.workers:
            parts = f" ({need.workers} x {amount(need.each)})" if len(capacity.nodes) > 1 else ""
            raise ResourceError(
                f"{node.name}: needs {need} at once{parts}; {where} has {capacity}. "
                f"Lower stages.{node.stage}.resources, or run on a larger cluster (--address)"
            )


def _import_task(task: Task) -> dict[str, Callable[..., Any]]:
    functions = {}
    for place, reference in task.references.items():
        try:
            functions[place] = imports.resolve(reference)
        except SpecError as error:
            raise SpecError(f"task.{place}: {reference!r}: {error}") from error.__cause__
    for place, function in functions.items():
        problem = _why_not_called(place, function)
        if problem:
            raise SpecError(f"task.{place}: {task.references[place]!r} {problem}")
    return functions


def _why_not_called(place: str, function: Any) -> str | None:
    if place in {"model", "data"}:  # their arguments are in the stages' configs
        return imports.why_not_callable(function, (), partial=True)
    if place == "loss" and isinstance(function, type):  # such as torch.nn:CrossEntropyLoss, made with its defaults
        return imports.why_not_callable(function, ())
    problem = imports.why_not_callable(function, (), positional=2)
    called = {"train_fn": "context, config", "train_step": "model, batch"}.get(place, "outputs, targets")
    return f"{problem}; it is called with ({called})" if problem and callable(function) else problem


# --- expansion -------------------------------------------------------------------------------------


def _expand(
    pipeline: Pipeline,
    stage: Stage,
    place: str,
    by_stage: Mapping[str, list[Node]],
    functions: Mapping[str, Callable[..., Any]],
) -> Iterator[Node]:
    try:
        kind = find_kind(stage.uses)
    except SpecError as error:
        raise SpecError(f"{place}.uses: {error}") from error.__cause__
    slots = _connect(pipeline, stage, kind, place, by_stage)
    for path in stage.matrix:
        problem = why_not_a_path(kind.config, path)
        if problem:
            raise SpecError(f"{place}.matrix.{path}: {problem}")
    axes = [[(path, value) for value in values] for path, values in stage.matrix.items()]
    singles = [[(slot, node) for node in nodes] for slot, nodes in slots.items() if not kind.inputs[slot].many]
    for values, variants in itertools.product(itertools.product(*axes), itertools.product(*singles)):
        written: dict[str, Any] = dict(stage.config)
        for path, value in values:
            written = set_path(written, path, value)
        labels = [f"{path}={value}" for path, value in values]
        labels += [node.name for (slot, node) in variants if len(slots[slot]) > 1]
        inputs: dict[str, tuple[Node, ...]] = {slot: (node,) for slot, node in variants}
        inputs |= {slot: tuple(nodes) for slot, nodes in slots.items() if kind.inputs[slot].many}
        config = validate(kind.config, written, f"{place}.config")
        upstream = {slot: [(node.kind, node.config) for node in nodes] for slot, nodes in inputs.items()}
        view = ConfigView(pipeline.task, functions, upstream, stage.resources, pipeline.root)
        _check(kind, config, view, place)
        identity = _identity(pipeline, kind, config, view, inputs)
        digest = fingerprint(identity)
        yield Node(
            name=f"{stage.name}[{','.join(labels)}]" if labels else stage.name,
            stage=stage.name,
            uses=stage.uses,
            kind=kind,
            config=config,
            inputs=inputs,
            resources=stage.resources,
            retries=stage.retries,
            explained=_explain(kind, config, view, place),
            identity=identity,
            fingerprint=digest,
            folder=pipeline.storage_folder / pipeline.name / stage.name / digest,
        )


def _check_distinct(nodes: Sequence[Node], place: str) -> None:
    """Nodes that are the same would be made twice, in one folder."""
    seen: dict[str, Node] = {}
    for node in nodes:
        twin = seen.get(node.name) or seen.get(node.fingerprint)
        if twin:
            raise SpecError(f"{place}: {twin.name} and {node.name} are the same; leave one out")
        seen |= {node.name: node, node.fingerprint: node}


def _check(kind: StageKind, config: Spec, view: ConfigView, place: str) -> None:
    try:
        problems = list(kind.check(config, view))
    except SpecError as error:
        problems = [str(error)]
    if problems:
        raise SpecError("\n".join(f"{place}.{problem}" for problem in problems))


def _explain(kind: StageKind, config: Spec, view: ConfigView, place: str) -> Mapping[str, str]:
    try:
        return kind.explain(config, view)
    except SpecError as error:
        raise SpecError(f"{place}.config.{error}") from error.__cause__


def _connect(
    pipeline: Pipeline, stage: Stage, kind: StageKind, place: str, by_stage: Mapping[str, list[Node]]
) -> dict[str, list[Node]]:
    """The nodes that go into each slot, checked: the slot exists, the stage comes earlier, the kinds agree."""
    later = [s.name for s in pipeline.stages]
    slots: dict[str, list[Node]] = {}
    for slot, names in stage.inputs.items():
        if slot not in kind.inputs:
            raise SpecError(f"{place}.inputs.{slot}: {kind.name} has no input {slot!r}{nearest(slot, kind.inputs)}")
        for position, name in enumerate(names):
            if name in names[:position]:
                raise SpecError(f"{place}.inputs.{slot}: {name!r} is there twice")
            if name == stage.name:
                raise SpecError(f"{place}.inputs.{slot}: {name!r} is this stage itself{nearest(name, by_stage)}")
            if name not in by_stage:
                when = "comes later" if name in later else "does not exist"
                raise SpecError(f"{place}.inputs.{slot}: the stage {name!r} {when}{nearest(name, by_stage)}")
            slots.setdefault(slot, []).extend(by_stage[name])
            _check_edge(kind.inputs[slot], by_stage[name][0], f"{place}.inputs.{slot}")
    for slot, wanted in kind.inputs.items():
        if not slots.get(slot) and not wanted.optional:
            raise SpecError(
                f"{place}.inputs.{slot}: missing; {kind.name} needs the name of a stage that makes a {wanted.kind}"
            )
    return slots


def _check_edge(wanted: Slot, node: Node, place: str) -> None:
    if node.kind.output != wanted.kind:
        raise SpecError(f"{place}: {node.stage!r} makes {node.kind.output!r}, but the input takes {wanted.kind!r}")


def _sources(pipeline: Pipeline, kind: StageKind, config: Spec) -> dict[str, str]:
    references = [*pipeline.task.references.values(), kind.reference, *config.code_references]
    return imports.digest_sources(imports.own_sources(references, pipeline.root))


def _identity(
    pipeline: Pipeline,
    kind: StageKind,
    config: Spec,
    view: ConfigView,
    inputs: Mapping[str, tuple[Node, ...]],
) -> dict[str, Any]:
    task = pipeline.task.model_dump(mode="json")
    return {
        "kind": kind.name,
        "version": kind.version,
        "task": task,
        "sources": _sources(pipeline, kind, config),
        "config": kind.identity(config, view),
        "seed": pipeline.seed,
        "inputs": {slot: [node.fingerprint for node in nodes] for slot, nodes in sorted(inputs.items())},
    }


# --- what the store has ----------------------------------------------------------------------------


class _History:
    """What the store says of earlier nodes of this pipeline, read once."""

    def __init__(self, pipeline: Pipeline, elsewhere: Mapping[Path, int]) -> None:
        self._elsewhere = elsewhere
        self._latest: dict[str, Record] = {}
        self._seconds: dict[str, float] = {}
        self._names: dict[str, str] = {}
        for _, record in records(pipeline.storage_folder, pipeline=pipeline.name):
            self._latest[record.node] = record
            self._seconds[record.stage] = record.seconds
            self._names[record.fingerprint] = record.node

    def look_up(self, node: Node, *, forced: bool) -> Node:
        self._names[node.fingerprint] = node.name
        again = [up.name for up in node.upstream if up.reason.startswith("forced")]
        found = None if forced or again else find_artifact(node.folder, elsewhere=self._elsewhere)
        if found is not None:
            unmeasured = node.has_speed and found.speed is None
            reason = f"done {found.record.started_at}" + ("; its speed is left to be measured" if unmeasured else "")
            return replace(node, status="reuse", reason=reason, unmeasured=unmeasured, estimate_s=0.0)
        if forced or again:
            reason = "forced" + (f" with {', '.join(again)}" if again and not forced else "")
        else:
            reason = self._why(node)
        return replace(node, reason=reason, estimate_s=self._seconds.get(node.stage))

    def _why(self, node: Node) -> str:
        before = self._latest.get(node.name)
        if before is None:
            started = node.folder.is_dir() and any(node.folder.iterdir())
            started = started or any(path.is_relative_to(node.folder) for path in self._elsewhere)
            return "goes on where it was interrupted" if started else "first run"
        if before.fingerprint == node.fingerprint:
            if wrong := damaged(node.folder, before.files):
                return f"files of the artifact are damaged: {', '.join(wrong)}"
            return "files of the artifact are missing or cut short"
        return "; ".join(explain_change(before.identity, node.identity, names=self._names))


def record_of(node: Node) -> Record:
    """The record of a node that is done, whether its files are here or not. Raises ArtifactError when it is not."""
    record = read_record(node.folder)
    if record is None:
        raise ArtifactError(f"{node.name}: no record in {node.folder}")
    return record


def artifact_of(node: Node) -> Artifact:
    """The artifact of a node that is done. Raises ArtifactError when it is not."""
    found = find_artifact(node.folder)
    if found is None:
        record = read_record(node.folder)
        wrong = record and (lacking(node.folder, record.files) or damaged(node.folder, record.files))
        what = f"missing or damaged: {', '.join(wrong)}; the next run makes them again" if wrong else "no record"
        raise ArtifactError(f"{node.name}: no finished artifact in {node.folder}: {what}")
    return _as_set_now(found, node)


def _as_set_now(artifact: Artifact, node: Node) -> Artifact:
    """An artifact whose params have the settings that the file has now: they are no reason to make the model again."""
    params = artifact.record.params
    if not isinstance(params.get("train"), Mapping) or not (settings := _settings_of(node)):
        return artifact
    given = {name: value for name, value in settings.items() if value is not None}
    others = {name: value for name, value in params["train"].items() if name not in settings}
    return replace(artifact, record=replace(artifact.record, params={**params, "train": {**others, **given}}))


def _settings_of(node: Node) -> dict[str, Any]:
    """Those of the config that a node's model was trained by: its own, or that of the nearest node before it."""
    found = node.config.settings()
    return found or next(filter(None, map(_settings_of, node.upstream)), {})
