"""The runner: a plan, one run of it at a time in a store, on a Ray of its own or on a running one."""

import fcntl
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import heliostat.stages  # noqa: F401 - registers the built-in stages
from heliostat.core import load
from heliostat.core.artifact import RECORD, read_record
from heliostat.core.capacity import Capacity
from heliostat.core.commands import run_again
from heliostat.core.disk import disk_error, why_not_written, with_advice
from heliostat.core.outcome import NodeOutcome, RunResult, Unwatched, View, outcome_of, reused
from heliostat.core.plan import Plan, check_fits, plan_pipeline, record_of
from heliostat.core.spec import Pipeline
from heliostat.core.stage import built_in_kind
from heliostat.core.tracking_uri import check_place
from heliostat.errors import ArtifactError, SpecError
from heliostat.execution import Execution, call_up_first
from heliostat.history import History, run_key
from heliostat.mirror import Mirror, mirror_of
from heliostat.report import runs
from heliostat.report.documents import run_document

if TYPE_CHECKING:
    from heliostat.runtime.session import Session


def load_pipeline(path: str | Path, *, settings: Sequence[str] = ()) -> Pipeline:
    """The pipeline of a YAML file. Raises SpecError that names the place, the value and the nearest right word."""
    return load.load_pipeline(path, settings=settings)


def plan(pipeline: Pipeline, *, force: Sequence[str] = ()) -> Plan:
    """What would run, what would be reused, and why. Imports the user's functions, calls none of them."""
    return _planned(pipeline, mirror_of(pipeline), force)


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
        ArtifactError: at the end, when a bucket has not taken all that was made.
    """
    view, mirror = view or Unwatched(), mirror_of(pipeline)
    run_id = runs.new_run_id(pipeline.name)
    with _called_up_early(pipeline, address, log=_log_of(pipeline, run_id)) as ray:
        planned = _planned(pipeline, mirror, force)
        if _nothing_left(planned):
            return _all_reused(planned, mirror, view)
        with _only_run(pipeline, view):
            planned = _planned(pipeline, mirror, force)  # another run may have finished some of it meanwhile
            if _nothing_left(planned):
                return _all_reused(planned, mirror, view)
            return _run_plan(planned, mirror, run_id, address=address, ray=ray, view=view)


def _planned(pipeline: Pipeline, mirror: Mirror, force: Sequence[str]) -> Plan:
    return plan_pipeline(pipeline, force=force, elsewhere=mirror.look(pipeline.name))


def _log_of(pipeline: Pipeline, run_id: str) -> Path:
    return pipeline.storage_folder / "logs" / f"{run_id}.log"


@contextmanager
def _called_up_early(pipeline: Pipeline, address: str | None, *, log: Path) -> Iterator["Session | None"]:
    """A Ray that runs, connected to before there is a plan, where a stage that begins the run has processes to start.

    They start while the user's modules are imported, which takes as long. None where it is not known yet whether
    anything will run, and for an embedded Ray, which no command should start in vain.
    """
    first = pipeline.stages[0]
    kind = built_in_kind(first.uses)
    done = any((pipeline.storage_folder / pipeline.name / first.name).glob(f"*/{RECORD}"))
    if address is None or kind is None or kind.call_up is None or first.matrix or done or pipeline.bucket_url:
        yield None
        return
    from heliostat.runtime import session

    with _written_to(pipeline.storage_folder):
        log.parent.mkdir(parents=True, exist_ok=True)
    with session.start(address, log=log, root=pipeline.root) as ray:
        kind.call_up(pipeline.storage_folder / pipeline.name / first.name, first.resources)
        yield ray


def check_fits_here(planned: Plan) -> None:
    """Raises ResourceError for a node that this machine's CPUs can never hold, before any Ray is started to ask."""
    check_fits(planned, Capacity(({"CPU": os.cpu_count() or 1},), unsaid=math.inf), where="this machine")


def _nothing_left(planned: Plan) -> bool:
    """Whether every node is done and measured, and the run that did the last of them lived to say so in MLflow."""
    pipeline = planned.pipeline
    done = all(node.status == "reuse" and not node.unmeasured for node in planned.nodes)
    return done and not runs.cut_off(pipeline.storage_folder, pipeline.name)


def _all_reused(planned: Plan, mirror: Mirror, view: View) -> RunResult:
    view.began(planned, log=None)
    outcomes = [reused(node) for node in planned.nodes]
    for outcome in outcomes:
        view.ended(outcome)
    pipeline = planned.pipeline
    run_id = next((record.tracking.get("pipeline_run_id") for record in map(record_of, planned.nodes)), None)
    tracking = {"uri": pipeline.tracking_uri, "experiment": pipeline.experiment, "run_id": run_id}
    _send_all(planned, mirror)
    return RunResult(pipeline.name, "done", tuple(outcomes), tracking, _selected(planned, outcomes, mirror))


def _run_plan(
    planned: Plan, mirror: Mirror, run_id: str, *, address: str | None, ray: "Session | None", view: View
) -> RunResult:
    from heliostat.runtime import session

    pipeline = planned.pipeline
    if address is None:
        check_fits_here(planned)
    check_place(pipeline.tracking_uri)
    cut_off = [run["key"] for run in runs.cut_off(pipeline.storage_folder, pipeline.name)]
    key = run_key(planned, cut_off)
    log = _log_of(pipeline, run_id)
    view.began(planned, log=log)
    unfinished = [outcome_of(node, "skipped", error="the run has not ended") for node in planned.nodes]
    tracking: dict[str, str | None] = {"uri": pipeline.tracking_uri, "experiment": pipeline.experiment, "run_id": None}
    begun = RunResult(pipeline.name, "unfinished", tuple(unfinished), tracking, None, log)
    with _written_to(pipeline.storage_folder):
        document = runs.write_run(pipeline.storage_folder, run_id, {"key": key, **run_document(begun)})
        mirror.send(document)
    with ExitStack() as tracked:  # what is left to track is delivered while Ray ends
        preload = {
            module for node in planned.nodes if node.status == "run" for module in node.kind.preload(node.resources)
        }
        starting = session.start(address, log=log, root=pipeline.root, preload=preload)
        on_cluster = mirror.on_cluster() if address else nullcontext()
        with nullcontext(ray) if ray else starting as live, on_cluster:
            if live.warning:
                view.note(live.warning)
            session.import_all(preload)
            where = "this machine" if address is None else f"the cluster at {address}"
            check_fits(planned, live.capacity(), where=where)
            live.check_storage(planned)
            call_up_first(planned)
            history = tracked.enter_context(History.open(planned, key, view.note, cut_off))
            outcomes, interrupted = Execution(planned, history, mirror, view).run()
            failed = any(o.status in {"failed", "skipped"} for o in outcomes)
            status: Literal["done", "failed", "interrupted"] = (
                "interrupted" if interrupted else "failed" if failed else "done"
            )
            selected = _selected(planned, outcomes, mirror)
            history.end(status, selected, outcomes)
        untracked = history.close()
    tracking["run_id"] = history.run_id
    result = RunResult(pipeline.name, status, tuple(outcomes), tracking, selected, log, untracked)
    try:
        runs.write_run(pipeline.storage_folder, run_id, {"key": key, **run_document(result)})
    except OSError as error:  # what became of each node is still worth telling
        why = why_not_written(error, pipeline.storage_folder) or error
        view.note(f"{run_id} stays unfinished in the store's history: {why}")
    _send_all(planned, mirror, document)
    return result


def _send_all(planned: Plan, mirror: Mirror, *more: Path) -> None:
    """What the bucket has not taken yet. Raises ArtifactError."""
    try:
        mirror.send(*(node.folder for node in planned.nodes if read_record(node.folder)), *more)
    except ArtifactError as error:
        store = planned.pipeline.storage_folder
        raise ArtifactError(f"{error}; what was made is in {store}, and this sends it: {run_again()}") from error


def _selected(planned: Plan, outcomes: Sequence[NodeOutcome], mirror: Mirror) -> dict[str, Any] | None:
    """The chosen model of the last `select` node that is there."""
    done = {outcome.name for outcome in outcomes if outcome.status in {"ran", "reused"}}
    for node in reversed(planned.nodes):
        if node.kind.name == "select" and node.name in done:
            mirror.fetch(node.folder)
            record = record_of(node)
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
        if (full := disk_error(error, store)) is not None:
            raise SpecError(f"storage: {with_advice(full)}") from error
        raise SpecError(f"storage: {store} cannot be written: {error.strerror}") from error
    except ArtifactError as error:
        raise SpecError(str(error)) from error


__all__ = ["NodeOutcome", "RunResult", "Unwatched", "View", "check_fits_here", "load_pipeline", "plan", "run"]
