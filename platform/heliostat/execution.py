"""Carrying out a plan: every node is made, measured and recorded; independent nodes side by side.

    the stage's function  ->  quality  ->  record  ->  speed, of all that wait for it  ->  into the record

Each node has a thread that waits for it: stages that drive Ray themselves run in that thread, all others in a Ray task.
Speed needs a node of the cluster to itself, so it is measured when nothing else can go on, of all models that wait for
it in one go; stages that do not look at it start before that. A failed node stops those that need it and no others.
"""

import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

from heliostat.core.artifact import Artifact, Record, digest_files, keep_only, read_record, write_record
from heliostat.core.capacity import NOTHING
from heliostat.core.carrier import Files, followed, supplied
from heliostat.core.disk import why_failed
from heliostat.core.integrity import damaged
from heliostat.core.outcome import NodeOutcome, Status, View, outcome_of, reused
from heliostat.core.plan import Node, Plan, artifact_of, record_of
from heliostat.core.stage import SHELF, StageContext, StageResult, call_stage
from heliostat.errors import ArtifactError, StageError
from heliostat.history import History, NodeReporter
from heliostat.mirror import Exchange, Mirror
from heliostat.stages.falls import falls_of
from heliostat.stages.measure import (
    Speed,
    Subject,
    assess_quality,
    call_example,
    folders_of,
    measure_speeds,
    timed,
    with_speed,
)

POLL_S = 0.2
KEEP_SECONDS_EVERY_S = 2.0
"""A process that is killed loses at most so much of the time that its stages have worked."""


@dataclass(frozen=True)
class _Made:
    """A node whose model is there and recorded, and waits for its speed to be measured."""

    node: Node
    artifact: Artifact
    status: Literal["ran", "reused"]


class Execution:
    """One run of a plan. The main thread hands out work; threads of a pool wait for it."""

    def __init__(self, planned: Plan, history: History, mirror: Mirror, view: View) -> None:
        self._plan, self._history, self._mirror, self._view = planned, history, mirror, view
        self._cancel = threading.Event()
        self._outcomes: dict[str, NodeOutcome] = {}
        self._made: set[str] = set()
        """The nodes whose model is there, measured or not."""
        self._unmeasured: list[_Made] = []
        self._working: dict[str, NodeReporter] = {}
        self._kept_at = time.monotonic()

    def run(self) -> tuple[list[NodeOutcome], bool]:
        """The outcome of every node in the plan's order, and whether the run was interrupted."""
        interrupted = False
        for node in self._plan.nodes:
            if node.reason.startswith("forced"):
                shutil.rmtree(node.folder.parent / SHELF, ignore_errors=True)
        with ThreadPoolExecutor(max_workers=len(self._plan.nodes) + 1, thread_name_prefix="node") as pool:
            running: dict[Future[list[NodeOutcome | _Made]], list[Node]] = {}
            try:
                while True:
                    for node in self._ready([node for nodes in running.values() for node in nodes]):
                        running[pool.submit(self._make, node)] = [node]
                    if self._unmeasured and self._is_time_to_measure(running.values()):
                        waiting, self._unmeasured = self._unmeasured, []
                        running[pool.submit(self._measure, waiting)] = [made.node for made in waiting]
                    if not running:
                        break
                    done, _ = wait(running, timeout=POLL_S, return_when=FIRST_COMPLETED)
                    for future in done:
                        del running[future]
                        self._take(future.result())
                    self._keep_seconds()
            except KeyboardInterrupt:
                interrupted = True
                self._view.note("stopping: what is finished is kept")
                self._cancel.set()
                for future in running:
                    self._take(future.result())
                for made in self._unmeasured:
                    self._settle(self._left_unmeasured(made))
            finally:
                self._cancel.set()
        for node in self._plan.nodes:
            if node.name not in self._outcomes:
                self._settle(outcome_of(node, "skipped", error="interrupted"))
            if self._status(node) == "ran":
                self._clear_shelves(node)
        return [self._outcomes[node.name] for node in self._plan.nodes], interrupted

    def _keep_seconds(self) -> None:
        if time.monotonic() - self._kept_at > KEEP_SECONDS_EVERY_S:
            self._kept_at = time.monotonic()
            for reporter in list(self._working.values()):
                reporter.keep_seconds()

    def _take(self, results: Iterable[NodeOutcome | _Made]) -> None:
        for result in results:
            if isinstance(result, NodeOutcome):
                self._settle(result)
            else:
                self._made.add(result.node.name)
                self._unmeasured.append(result)

    def _settle(self, outcome: NodeOutcome) -> None:
        self._outcomes[outcome.name] = outcome
        self._view.ended(outcome)

    def _clear_shelves(self, node: Node) -> None:
        """What its stage keeps for inputs that it has no more, such as a model of other data, goes: it only grew."""
        live = {other.shelf for other in self._plan.nodes if other.stage == node.stage}
        for shelf in set(node.shelf.parent.glob("*")) - live:
            shutil.rmtree(shelf)

    # --- what may start ---------------------------------------------------------------------------

    def _ready(self, running: Sequence[Node]) -> Iterator[Node]:
        """Nodes to start now. On the way, those that are reused or can never run are settled."""
        for node in self._plan.nodes:
            if node.name in self._outcomes or node.name in self._made or node in running:
                continue
            if node.status == "reuse":
                self._history.reused(node)
                found = Artifact(node.folder, record_of(node))
                self._take([_Made(node, found, "reused") if node.unmeasured else reused(node)])
                continue
            failed = [up.name for up in node.upstream if self._status(up) in {"failed", "skipped"}]
            if failed:
                self._settle(outcome_of(node, "skipped", error=f"needs {', '.join(failed)}"))
            elif all(self._is_there(up, for_node=node) for up in node.upstream):
                yield node

    def _status(self, node: Node) -> Status | None:
        outcome = self._outcomes.get(node.name)
        return outcome.status if outcome else None

    def _is_there(self, node: Node, *, for_node: Node) -> bool:
        return self._status(node) is not None or (node.name in self._made and for_node.kind.measured == "later")

    def _is_time_to_measure(self, running: Iterable[Sequence[Node]]) -> bool:
        """When nothing else runs, or when a whole node of the cluster has nothing to do."""
        from heliostat.runtime.tasks import has_idle_node

        return not list(running) or has_idle_node()

    # --- making -----------------------------------------------------------------------------------

    def _make(self, node: Node) -> list[NodeOutcome | _Made]:
        """Run the stage, measure the quality of the model that it made, if any, and record both."""
        anew = node.reason.startswith("forced")
        reporter = self._working[node.name] = self._reporter(node)
        if anew:
            shutil.rmtree(node.folder, ignore_errors=True)
            reporter.forget_seconds(is_done=False)
        try:
            node.folder.mkdir(parents=True, exist_ok=True)
            _drop_damaged(node.folder)
            with self._mirror.following(node.folder, anew=anew) as exchange:
                record = self._run_stage(node, reporter, exchange)
                self._history.finished(node, record)
                if node.kind.name == "select":
                    call = (call_example, node.folder, self._plan.pipeline.task, record.params)
                    example = self._task(node, *call, needed={node.folder: record.files})
                    self._history.chose(node, example)
                write_record(node.folder, record)
            reporter.forget_seconds(is_done=True)
        except KeyboardInterrupt:
            reporter.cut_off()
            self._history.interrupted(node, seconds=reporter.seconds)
            return [outcome_of(node, "skipped", error="interrupted")]
        except Exception as error:
            reporter.cut_off()
            return [self._failed(node, error, seconds=reporter.seconds)]
        finally:
            del self._working[node.name]
        if not node.has_speed:
            return [outcome_of(node, "ran", seconds=record.seconds, metrics=record.metrics)]
        self._view.made(node, record.metrics)
        return [_Made(node, Artifact(node.folder, record), "ran")]

    def _run_stage(self, node: Node, reporter: NodeReporter, exchange: Exchange) -> Record:
        pipeline = self._plan.pipeline
        reporter.params = _params_used(node)
        context = self._plan.context(
            node,
            inputs=self._inputs(node),
            reporter=reporter,
            cancel=self._cancel,
            carrier=self._mirror.carrier(node.folder),
        )
        result = self._call(node, context)
        reporter.began()
        seconds, started_at = reporter.seconds, datetime.now(UTC) - timedelta(seconds=reporter.seconds_of_attempt)
        exchange(result.files)
        files, metrics, details = digest_files(node.folder, result.files), dict(result.metrics), dict(result.details)
        if node.has_speed:
            self._view.progress(node, {"doing": "measuring"})
            call = (timed, assess_quality, node.folder, pipeline.task, result.params, result.validated)
            quality, measuring_s = self._task(node, *call, needed={node.folder: files})
            metrics |= quality.figures
            details |= {"missing": quality.missing} if quality.missing else {}
            seconds += measuring_s
            for warning in falls_of(node, context.inputs, metrics, result.details, modes=pipeline.task.metric_modes):
                reporter.warn(warning)
        warnings = list(dict.fromkeys([*result.details.get("warnings", ()), *reporter.warnings]))
        keep_only(node.folder, result.files)
        return Record(
            kind=node.kind.output,
            pipeline=pipeline.name,
            node=node.name,
            stage=node.stage,
            uses=node.uses,
            fingerprint=node.fingerprint,
            identity=node.identity,
            metrics=metrics,
            params=result.params,
            details={**details, "warnings": warnings} if warnings else details,
            inputs={
                slot: [{"node": n.name, "fingerprint": n.fingerprint} for n in nodes]
                for slot, nodes in node.inputs.items()
            },
            files=files,
            tracking=self._history.ids(node),
            versions=self._history.versions,
            git_commit=self._history.git_commit,
            started_at=started_at.isoformat(timespec="seconds"),
            seconds=round(seconds, 3),
        )

    def _reporter(self, node: Node) -> NodeReporter:
        call_up = partial(self._call_up_next, node)
        return self._history.reporter(node, self._view, when_nearly_over=call_up)

    def _call_up_next(self, last: Node) -> None:
        """Have the processes started of the nodes that wait for `last` alone."""
        for node in self._plan.nodes:
            missing = [up for up in node.upstream if up.status == "run" and not self._is_there(up, for_node=node)]
            if node.status == "run" and missing == [last]:
                _call_up(node)

    def _inputs(self, node: Node) -> dict[str, tuple[Artifact, ...]]:
        for upstream in node.upstream:
            self._mirror.fetch(upstream.folder)
        inputs = {slot: tuple(map(artifact_of, nodes)) for slot, nodes in node.inputs.items()}
        return self._measured_together(node, inputs) if node.kind.measured == "together" else inputs

    def _call(self, node: Node, context: StageContext) -> StageResult:
        if node.kind.place == "driver":
            # The built-in stages that wait for processes say when they have them.
            if not node.kind.is_built_in or node.kind.needs(node.resources) == NOTHING:
                context.reporter.began()
            return node.kind.call(context, node.config)
        from heliostat.runtime.hang import NOTE, call_stage_watched, told_where_it_hung
        from heliostat.runtime.mailbox import relay

        needed = {one.folder: one.record.files for artifacts in context.inputs.values() for one in artifacts}
        config, timeout_s = node.config.model_dump(mode="json", exclude_unset=True), node.resources.hang_timeout_s
        with relay(context.reporter) as remote, told_where_it_hung(timeout_s, note=node.folder / NOTE):
            result: StageResult = self._task(
                node,
                # One of the user's own may wait for anything.
                call_stage_watched if node.kind.is_built_in else call_stage,
                node.kind.reference,
                replace(context, reporter=remote, cancel=None),
                config,
                call=followed,
                needed=needed,
                held=node.resources.per_worker,
                warn=context.reporter.warn,
            )
        return result

    def _task(
        self,
        node: Node,
        function: Callable[..., Any],
        *args: Any,
        needed: Mapping[Path, Files],
        call: Callable[..., Any] = supplied,
        **options: Any,
    ) -> Any:
        """`function(*args)` in a Ray task that has the files `needed`, of each folder, at hand."""
        from heliostat.runtime.tasks import run_task

        root, carrier = self._plan.pipeline.root, self._mirror.carrier(node.folder)
        call = partial(call, carrier, needed, function)
        return run_task(call, *args, root=root, retries=node.retries, cancel=self._cancel, **options)

    # --- measuring speed --------------------------------------------------------------------------

    def _measure(self, waiting: Sequence[_Made]) -> list[NodeOutcome | _Made]:
        """Measure the speed of all that wait for it, in one go, and put it into their records."""
        try:
            speeds = self._speeds(waiting)
        except KeyboardInterrupt:
            return [self._left_unmeasured(made) for made in waiting]
        return [self._measured(made, speed) for made, speed in zip(waiting, speeds)]

    def _speeds(self, waiting: Sequence[_Made]) -> list[Speed | str]:
        """Their speeds, or why there is none. A model that brings the measurement down does so to itself alone."""
        try:
            subjects = [_subject(made.node, made.artifact) for made in waiting]
            for folder in folders_of(subjects):
                self._mirror.fetch(folder)
            return self._measure_exclusively(waiting[0].node, subjects)
        except (StageError, ArtifactError) as error:
            if len(waiting) == 1:
                return [str(error)]
            return [speed for made in waiting for speed in self._speeds([made])]

    def _measure_exclusively(self, node: Node, subjects: Sequence[Subject]) -> list[Speed | str]:
        needed = {folder: record.files for folder in folders_of(subjects) if (record := read_record(folder))}
        call = (measure_speeds, subjects, self._plan.pipeline.task)
        measured: list[Speed | str] = self._task(node, *call, needed=needed, exclusive=True)
        return measured

    def _measured(self, made: _Made, speed: Speed | str) -> NodeOutcome:
        node, record = made.node, made.artifact.record
        try:
            if isinstance(speed, str):
                raise StageError(speed)
            record = with_speed(record, speed)
            self._history.measured(node, record, speed.metrics)
            write_record(node.folder, record)
        except Exception as error:
            return self._failed(node, error, seconds=record.seconds, made=record)
        return outcome_of(node, made.status, seconds=record.seconds, metrics=record.metrics)

    def _left_unmeasured(self, made: _Made) -> NodeOutcome:
        """A run that was interrupted keeps the model; the next one measures it."""
        record = made.artifact.record
        return outcome_of(made.node, made.status, seconds=record.seconds, metrics=record.metrics)

    def _measured_together(
        self, node: Node, inputs: Mapping[str, tuple[Artifact, ...]]
    ) -> dict[str, tuple[Artifact, ...]]:
        """The inputs with speeds that can be compared: measured again where they are not of one measurement."""
        artifacts = {artifact.folder: artifact for group in inputs.values() for artifact in group}
        sessions = {(artifact.speed or {}).get("session") for artifact in artifacts.values()}
        if len(sessions) > 1 or None in sessions:
            self._view.progress(node, {"doing": "measuring all of them together"})
            subjects = [Subject(a.folder, a.record.params, a.record.uses) for a in artifacts.values()]
            for artifact, speed in zip(list(artifacts.values()), self._measure_exclusively(node, subjects)):
                if isinstance(speed, str):
                    raise StageError(f"{artifact.node}: {speed}")
                artifacts[artifact.folder] = replace(artifact, record=with_speed(artifact.record, speed))
        return {slot: tuple(artifacts[artifact.folder] for artifact in group) for slot, group in inputs.items()}

    def _failed(self, node: Node, error: Exception, *, seconds: float, made: Record | None = None) -> NodeOutcome:
        text = why_failed(error, node.folder)
        self._history.failed(node, text, seconds=seconds, made=made)
        return outcome_of(node, "failed", seconds=seconds, error=text)


def _params_used(node: Node) -> Mapping[str, Any]:
    return node.kind.params_used(node.config, {slot: tuple(map(record_of, ups)) for slot, ups in node.inputs.items()})


def _drop_damaged(folder: Path) -> None:
    """A journal with a changed line would be taken for the truth when its search runs again."""
    record = read_record(folder)
    for name in damaged(folder, record.files) if record else ():
        (folder / name).unlink()


def _subject(node: Node, artifact: Artifact) -> Subject:
    source = next((up.folder for up in node.upstream if up.kind.output == "model"), None)
    return Subject(node.folder, artifact.record.params, getattr(node.config, "method", node.kind.name), source)


def call_up_first(planned: Plan) -> None:
    """Have the processes started of the nodes that wait for no other."""
    for node in planned.nodes:
        if node.status == "run" and all(up.status == "reuse" for up in node.upstream):
            _call_up(node)


def _call_up(node: Node) -> None:
    if node.kind.call_up is not None:
        node.kind.call_up(node.folder, node.resources)
