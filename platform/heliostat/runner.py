"""The runner: plan -> every node: reuse or run -> record -> track; independent nodes side by side.

Each node that has to run gets a thread, which waits for it: stages that drive Ray themselves run in that thread, all
others in a Ray task. A node's record is written when everything else of it is on disk. A failed node stops those that
need it and no others.
"""

import fcntl
import math
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import heliostat.stages  # noqa: F401 - registers the built-in stages
from heliostat.core import load
from heliostat.core.artifact import Record, digest_files, keep_only, write_record
from heliostat.core.outcome import NodeOutcome, RunResult, Status, Unwatched, View
from heliostat.core.plan import Node, Plan, artifact_of, check_fits, plan_pipeline
from heliostat.core.spec import Pipeline
from heliostat.core.stage import StageContext, StageResult, call_stage
from heliostat.errors import HeliostatError, SpecError
from heliostat.history import History
from heliostat.report import runs
from heliostat.report.documents import run_document

if TYPE_CHECKING:
    pass

POLL_S = 0.2


def load_pipeline(path: str | Path, *, settings: Sequence[str] = ()) -> Pipeline:
    """The pipeline of a YAML file. Raises SpecError that names the place, the value and the nearest right word."""
    return load.load_pipeline(path, settings=settings)


def plan(pipeline: Pipeline, *, force: Sequence[str] = ()) -> Plan:
    """What would run, what would be reused, and why. Imports the user's functions, calls none of them."""
    return plan_pipeline(pipeline, force=force)


def run(
    pipeline: Pipeline, *, address: str | None = None, force: Sequence[str] = (), view: View | None = None
) -> RunResult:
    """Run a pipeline: what is done is reused, what was interrupted goes on.

    Args:
        address: None starts an embedded Ray for this run; `auto`, `host:port` or `ray://host:port` uses a running one.
        force: stages whose nodes run again, with all nodes that need them.
        view: is told what happens.

    Raises:
        SpecError, ResourceError: before anything has started. A stage that fails does not raise; the result says so.
    """
    view = view or Unwatched()
    planned = plan_pipeline(pipeline, force=force)
    if all(node.status == "reuse" for node in planned.nodes):
        return _all_reused(planned, view)
    with _only_run(pipeline, view):
        planned = plan_pipeline(pipeline, force=force)  # another run may have finished some of it meanwhile
        return _run_plan(planned, address=address, view=view)


def check_fits_here(planned: Plan) -> None:
    """Raises ResourceError for a node that this machine's CPUs can never hold, before any Ray is started to ask."""
    check_fits(planned, cpus=os.cpu_count() or 1, gpus=math.inf, where="this machine")


def _all_reused(planned: Plan, view: View) -> RunResult:
    view.began(planned, log=None)
    outcomes = [_reused(node) for node in planned.nodes]
    for outcome in outcomes:
        view.ended(outcome)
    pipeline = planned.pipeline
    run_id = next((a.record.tracking.get("pipeline_run_id") for a in map(artifact_of, planned.nodes)), None)
    tracking = {"uri": pipeline.tracking_uri, "experiment": pipeline.experiment, "run_id": run_id}
    return RunResult(pipeline.name, "done", tuple(outcomes), tracking, _selected(planned, outcomes))


def _run_plan(planned: Plan, *, address: str | None, view: View) -> RunResult:
    from heliostat.runtime import session

    pipeline = planned.pipeline
    if address is None:
        check_fits_here(planned)
    run_id = runs.new_run_id(pipeline.name)
    log = pipeline.storage_folder / "logs" / f"{run_id}.log"
    view.began(planned, log=log)
    unfinished = [_outcome(node, "skipped", error="the run has not ended") for node in planned.nodes]
    tracking: dict[str, str | None] = {"uri": pipeline.tracking_uri, "experiment": pipeline.experiment, "run_id": None}
    with _written_to(pipeline.storage_folder):
        runs.write_run(
            pipeline.storage_folder,
            run_id,
            run_document(RunResult(pipeline.name, "unfinished", tuple(unfinished), tracking, None, log)),
        )
    with ExitStack() as tracked:  # what is left to track is delivered while Ray ends
        with session.start(address, log=log, root=pipeline.root) as ray:
            total = ray.resources()
            where = "this machine" if address is None else f"the cluster at {address}"
            check_fits(planned, cpus=total.get("CPU", 0), gpus=total.get("GPU", 0), where=where)
            history = tracked.enter_context(History.open(planned, view.note))
            outcomes, interrupted = _Execution(planned, history, view).run()
            failed = any(o.status in {"failed", "skipped"} for o in outcomes)
            status: Literal["done", "failed", "interrupted"] = (
                "interrupted" if interrupted else "failed" if failed else "done"
            )
            selected = _selected(planned, outcomes)
            history.end(status, selected)
        untracked = history.close()
    tracking["run_id"] = history.run_id
    result = RunResult(pipeline.name, status, tuple(outcomes), tracking, selected, log, untracked)
    try:
        runs.write_run(pipeline.storage_folder, run_id, run_document(result))
    except OSError as error:  # what became of each node is still worth telling
        view.note(f"{run_id} stays unfinished in the store's history: {error.strerror}")
    return result


class _Execution:
    """One run of a plan. The main thread hands out nodes; each node's thread runs it from start to record."""

    def __init__(self, planned: Plan, history: History, view: View) -> None:
        self._plan, self._history, self._view = planned, history, view
        self._cancel = threading.Event()
        self._outcomes: dict[str, NodeOutcome] = {}

    def run(self) -> tuple[list[NodeOutcome], bool]:
        """The outcome of every node in the plan's order, and whether the run was interrupted."""
        interrupted = False
        with ThreadPoolExecutor(max_workers=len(self._plan.nodes), thread_name_prefix="node") as pool:
            running: dict[Future[NodeOutcome], Node] = {}
            try:
                while True:
                    for node in self._ready(set(running.values())):
                        running[pool.submit(self._node, node)] = node
                    if not running:
                        break
                    done, _ = wait(running, timeout=POLL_S, return_when=FIRST_COMPLETED)
                    for future in done:
                        del running[future]
                        self._settle(future.result())
            except KeyboardInterrupt:
                interrupted = True
                self._view.note("stopping: what is finished is kept")
                self._cancel.set()
                for future in running:
                    self._settle(future.result())
            finally:
                self._cancel.set()
        for node in self._plan.nodes:
            if node.name not in self._outcomes:
                self._settle(_outcome(node, "skipped", error="interrupted"))
        return [self._outcomes[node.name] for node in self._plan.nodes], interrupted

    def _settle(self, outcome: NodeOutcome) -> None:
        self._outcomes[outcome.name] = outcome
        self._view.ended(outcome)

    def _ready(self, running: set[Node]) -> Iterator[Node]:
        """Nodes to start now. On the way, those that are reused or can never run are settled."""
        for node in self._plan.nodes:
            if node.name in self._outcomes or node in running:
                continue
            if node.status == "reuse":
                self._history.reused(node)
                self._settle(_reused(node))
                continue
            needed = [self._outcomes.get(up.name) for up in node.upstream]
            failed = [o.name for o in needed if o is not None and o.status in {"failed", "skipped"}]
            if failed:
                self._settle(_outcome(node, "skipped", error=f"needs {', '.join(failed)}"))
            elif all(o is not None for o in needed):
                yield node

    def _node(self, node: Node) -> NodeOutcome:
        self._view.started(node)
        self._history.started(node)
        started = time.monotonic()
        try:
            record = self._execute(node)
        except KeyboardInterrupt:
            self._history.ended(node, "KILLED")
            return _outcome(node, "skipped", error="interrupted")
        except Exception as error:
            text = str(error) if isinstance(error, HeliostatError) else _with_traceback(error)
            self._history.failed(node, text)
            return _outcome(node, "failed", seconds=time.monotonic() - started, error=text)
        self._history.finished(node, record)
        return _outcome(node, "ran", seconds=record.seconds, metrics=record.metrics)

    def _execute(self, node: Node) -> Record:
        """Run the stage, measure what it made, and write the record, last."""
        pipeline = self._plan.pipeline
        if node.reason.startswith("forced"):
            shutil.rmtree(node.folder, ignore_errors=True)
        node.folder.mkdir(parents=True, exist_ok=True)
        started_at, started = datetime.now(UTC), time.monotonic()
        context = StageContext(
            node=node.name,
            folder=node.folder,
            root=pipeline.root,
            task=pipeline.task,
            seed=pipeline.seed,
            resources=node.resources,
            inputs={slot: tuple(map(artifact_of, nodes)) for slot, nodes in node.inputs.items()},
            reporter=self._history.reporter(node, self._view),
            cancel=self._cancel,
        )
        result = self._call(node, context)
        metrics, details = dict(result.metrics), dict(result.details)
        if node.kind.output == "model" and not node.kind.keeps_metrics:
            measured, details["speed"] = self._measure(node, result)
            metrics |= measured
        keep_only(node.folder, result.files)
        record = Record(
            kind=node.kind.output,
            pipeline=pipeline.name,
            node=node.name,
            stage=node.stage,
            uses=node.uses,
            fingerprint=node.fingerprint,
            identity=node.identity,
            metrics=metrics,
            params=result.params,
            details=details,
            inputs={
                slot: [{"node": n.name, "fingerprint": n.fingerprint} for n in nodes]
                for slot, nodes in node.inputs.items()
            },
            files=digest_files(node.folder, result.files),
            tracking=self._history.ids(node),
            versions=self._history.versions,
            git_commit=self._history.git_commit,
            started_at=started_at.isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - started, 3),
        )
        write_record(node.folder, record)
        return record

    def _call(self, node: Node, context: StageContext) -> StageResult:
        if node.kind.place == "driver":
            return node.kind.function(context, node.config)
        from heliostat.runtime.mailbox import relay
        from heliostat.runtime.tasks import run_task

        config = node.config.model_dump(mode="json", exclude_unset=True)
        with relay(context.reporter) as remote:
            return run_task(
                call_stage,
                node.kind.reference,
                replace(context, reporter=remote, cancel=None),
                config,
                root=context.root,
                cpus=node.resources.cpus_per_worker,
                gpus=node.resources.gpus_per_worker,
                retries=node.retries,
                cancel=self._cancel,
            )

    def _measure(self, node: Node, result: StageResult) -> tuple[dict[str, float], dict[str, Any]]:
        """Quality beside other work, then speed with a node of the cluster to itself, against where it came from."""
        from heliostat.runtime.tasks import run_task
        from heliostat.stages.measure import measure_quality, measure_speed, recipe_of

        pipeline = self._plan.pipeline
        what = (node.folder, pipeline.task, recipe_of(result.params))
        source = next((n.folder for n in node.upstream if n.kind.output == "model"), None)
        method = getattr(node.config, "method", node.kind.name)
        how: dict[str, Any] = {"root": pipeline.root, "retries": node.retries, "cancel": self._cancel}
        self._view.progress(node, {"doing": "measuring"})
        quality = run_task(measure_quality, *what, **how)
        speed, verdict = run_task(measure_speed, *what, source, method, exclusive=True, **how)
        return {**quality, **speed}, verdict


def _with_traceback(error: Exception) -> str:
    import traceback

    return f"{type(error).__name__}: {error}\n{''.join(traceback.format_tb(error.__traceback__))}".rstrip()


def _outcome(node: Node, status: Status, **more: Any) -> NodeOutcome:
    return NodeOutcome(node.name, node.stage, node.uses, status, node.fingerprint, node.folder, **more)


def _reused(node: Node) -> NodeOutcome:
    return _outcome(node, "reused", metrics=artifact_of(node).record.metrics)


def _selected(planned: Plan, outcomes: Sequence[NodeOutcome]) -> dict[str, Any] | None:
    """The chosen model of the last `select` node that is there."""
    done = {outcome.name for outcome in outcomes if outcome.status in {"ran", "reused"}}
    for node in reversed(planned.nodes):
        if node.kind.name == "select" and node.name in done:
            record = artifact_of(node).record
            return {"node": record.details["chosen"], "path": str(node.folder), "metrics": dict(record.metrics)}
    return None


@contextmanager
def _only_run(pipeline: Pipeline, view: View) -> Iterator[None]:
    """Hold the pipeline's lock in the store: two runs of one pipeline do not write the same folders at once."""
    store = pipeline.storage_folder
    with _written_to(store):
        store.mkdir(parents=True, exist_ok=True)
        file = (store / f"{pipeline.name}.lock").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            view.note(f"another run of {pipeline.name!r} is using this store; waiting for it to end")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _written_to(store: Path) -> Iterator[None]:
    """Before anything has started: a store that takes no files is a wrong `storage`."""
    try:
        yield
    except OSError as error:
        raise SpecError(f"storage: {store} cannot be written: {error.strerror}") from error


__all__ = ["NodeOutcome", "RunResult", "Unwatched", "View", "check_fits_here", "load_pipeline", "plan", "run"]
