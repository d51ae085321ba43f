"""How a run gets into MLflow: one tree, pipeline > stage > trial, under keys that stay the same when a run resumes."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import yaml

from heliostat.core.artifact import Record, artifact_json, read_record, write_record
from heliostat.core.commands import with_store
from heliostat.core.imports import own_sources
from heliostat.core.outcome import NodeOutcome
from heliostat.core.plan import Node, Plan, record_of
from heliostat.tracking.context import code_tags, git_commit, library_versions
from heliostat.tracking.events import NOTE_TAG
from heliostat.tracking.tracker import Tracker

if TYPE_CHECKING:
    import numpy as np

    from heliostat.core.outcome import View

_log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 60.0
TRIAL_STATUS: dict[str, Literal["FINISHED", "FAILED", "KILLED"]] = {
    "done": "FINISHED",
    "stopped": "KILLED",  # as MLflow's own storage for Optuna has it
    "failed": "FAILED",
}
BEST = "best_"
"""Precedes a figure of the model that is kept. The plain name belongs to the curve, which ends at the last epoch."""


def run_key(planned: Plan, cut_off: Sequence[str]) -> str:
    """The key of a run of the plan: a forced one is new; any other goes on with the newest of the keys `cut_off`.

    Those are of runs that were killed. One of this plan, forced or not, is the same run.
    """
    key = f"{planned.pipeline.name}/{planned.fingerprint}"
    if any(node.reason.startswith("forced") for node in planned.nodes):
        return f"{key}@{datetime.now(UTC).isoformat(timespec='seconds')}"
    return next((old for old in cut_off if old == key or old.startswith(f"{key}@")), key)


class History:
    """The MLflow side of one run of a plan, under its key."""

    def __init__(self, planned: Plan, key: str, tracker: Tracker) -> None:
        self._plan, self._key, self._tracker = planned, key, tracker
        self.versions = library_versions()
        self.git_commit = git_commit(planned.pipeline.root)

    @classmethod
    @contextmanager
    def open(
        cls, planned: Plan, key: str, note: Callable[[str], None], cut_off: Sequence[str] = ()
    ) -> Iterator["History"]:
        """Start tracking the run. Nothing of it blocks; what the store does not take stays in the spool.

        Runs that were killed, of the keys `cut_off`, end as such, unless this is one of them that goes on.
        """
        pipeline = planned.pipeline
        spool = pipeline.storage_folder / "spool"
        tracker = Tracker(pipeline.tracking_uri, experiment=pipeline.experiment, spool=spool)
        history = cls(planned, key, tracker)
        for killed in set(cut_off) - {key}:
            tracker.end_tree(killed, status="KILLED")
        history._begin()
        try:
            yield history
        finally:
            waiting = history.close()
            if waiting:
                send = with_store("sync", pipeline.storage_folder)
                reason = f", since {tracker.why_waiting}" if tracker.why_waiting else ""
                note(f"{waiting} tracking events wait in {spool}{reason}. To send them later: {send}")
            if tracker.lost:
                note(f"{tracker.lost} tracking events are lost: neither {pipeline.tracking_uri} nor {spool} took them")

    def _begin(self) -> None:
        pipeline = self._plan.pipeline
        document = pipeline.model_dump(mode="json", exclude_unset=True)
        tags = {"heliostat.pipeline": pipeline.name, **code_tags(pipeline.root)}
        self._tracker.start_run(self._key, name=pipeline.name, tags=tags, params={"seed": pipeline.seed})
        self._tracker.text(self._key, yaml.safe_dump(document, sort_keys=False), "pipeline.yaml")
        for path, content in own_sources(pipeline.task.references.values(), pipeline.root).items():
            self._tracker.text(self._key, content.decode("utf-8"), f"code/{path}")

    def _key_of(self, node: Node) -> str:
        return f"{self._key}/{node.fingerprint}"

    def started(self, node: Node, params: Mapping[str, Any]) -> None:
        """The node works, by `params`: those that it uses, which may not be those of the file."""
        tags = {"heliostat.stage": node.stage, "heliostat.uses": node.uses, "heliostat.fingerprint": node.fingerprint}
        self._tracker.start_run(self._key_of(node), name=node.name, parent=self._key, tags=tags, params=params)

    def reused(self, node: Node) -> None:
        run_id = record_of(node).tracking.get("run_id")
        self._tracker.tags(self._key, {f"heliostat.reused.{node.name}": run_id or node.fingerprint})

    def reporter(self, node: Node, view: "View", *, when_nearly_over: Callable[[], None]) -> "NodeReporter":
        """`when_nearly_over` is called when the last of the things that the stage does is left."""
        begin = partial(self.started, node)
        return NodeReporter(self._tracker, self._key_of(node), node, view, when_nearly_over, begin)

    def finished(self, node: Node, record: Record) -> None:
        """To be told before the record is written: a node that has one is reused, and not told of again."""
        key = self._key_of(node)
        epochs = record.details.get("history", ())
        for epoch, row in enumerate(epochs, 1):  # of those tracked already nothing changes; a crash may have lost one
            self._tracker.metrics(key, row, step=epoch)
        for row in record.details.get("validations", ()):
            self._tracker.metrics(key, {f"step_{name}": row[name] for name in row if name != "step"}, step=row["step"])
        self._tracker.metrics(key, _figures(record, record.metrics), step=_step(record))
        self._tracker.params(key, {f"result.{name}": value for name, value in record.params.items()})
        self._tracker.text(key, artifact_json(record), "record.json")
        self._tracker.tags(key, {"heliostat.path": str(node.folder)})
        self._tracker.end_run(key, status="FINISHED", seconds=record.seconds)

    def measured(self, node: Node, record: Record, speed: Mapping[str, float]) -> None:
        """The speed of a model, which is measured later than the rest: in the tree of the run that made the model.

        As `finished`, to be told before the record is written.
        """
        key = self._go_on(node, record)
        self._tracker.metrics(key, _figures(record, speed), step=_step(record))
        self._tracker.text(key, artifact_json(record), "record.json")
        self._tracker.end_run(key, status="FINISHED", seconds=record.seconds)

    def chose(self, node: Node, example: "tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]") -> None:
        """The chosen model as an MLflow model. `example` is a small batch of its inputs and what it gives for them."""
        inputs, outputs = example
        self._tracker.log_model(self._key_of(node), node.folder, input_example=inputs, output_example=outputs)

    def failed(self, node: Node, reason: str, *, seconds: float, made: Record | None = None) -> None:
        """`made` is the record of a model that failed only when its speed was measured."""
        key = self._go_on(node, made) if made else self._key_of(node)
        self._tracker.error(key, reason)
        self._tracker.end_run(key, status="FAILED", seconds=seconds)

    def _go_on(self, node: Node, made: Record) -> str:
        """Go on with the run that made a model, often one of an earlier tree; its key.

        Records of old stores have no key. Which run made the model is not known then, and this tree is told all of it.
        """
        key = made.tracking.get("key")
        if key is None:
            self.started(node, {})
            self.finished(node, made)
            return self._key_of(node)
        self._tracker.start_run(key, name=made.node, parent=key.rpartition("/")[0])
        return key

    def interrupted(self, node: Node, *, seconds: float) -> None:
        self._tracker.end_run(self._key_of(node), status="KILLED", seconds=seconds)

    def end(self, status: str, selected: Mapping[str, Any] | None, outcomes: Sequence[NodeOutcome] = ()) -> None:
        """The run is over. Of nodes that failed, and those that were skipped for it, it tells the reasons."""
        if status == "failed":
            self._tracker.error(self._key, "\n".join(_why_not_done(outcomes)))
        if selected is not None:
            self._tracker.metrics(self._key, selected["metrics"], step=0)
            self._tracker.tags(self._key, {"heliostat.selected": selected["node"]})
        ends: dict[str, Literal["FINISHED", "FAILED", "KILLED"]] = {"done": "FINISHED", "failed": "FAILED"}
        self._tracker.end_run(self._key, status=ends.get(status, "KILLED"))

    def ids(self, node: Node) -> dict[str, str]:
        """What the record keeps of the tracking: store, experiment, key, and run ids as far as a server has given them.

        MLflow finds the run of a key by its tag `heliostat.key`.
        """
        pipeline = self._plan.pipeline
        known = {
            "uri": pipeline.tracking_uri,
            "experiment": pipeline.experiment,
            "key": self._key_of(node),
            "run_id": self._tracker.run_id(self._key_of(node), 0.0),
            "pipeline_run_id": self.run_id,
        }
        return {name: value for name, value in known.items() if value is not None}

    @property
    def run_id(self) -> str | None:
        """The MLflow run id of the pipeline, once the store has it."""
        return self._tracker.run_id(self._key, 0.0)

    def close(self) -> int:
        """Deliver what is left; the number of events that wait in the spool."""
        waiting = self._tracker.close(timeout_s=CLOSE_TIMEOUT_S)
        for node in self._plan.nodes:
            self._name_run_in_record(node)
        return waiting

    def _name_run_in_record(self, node: Node) -> None:
        """A server may give a run its id only after a short stage has written its record."""
        record, ids = read_record(node.folder), self.ids(node)
        if record and record.tracking.get("key") == ids["key"] and record.tracking != ids:
            try:
                write_record(node.folder, replace(record, tracking=ids))
            except OSError as error:  # the record is whole without it
                _log.warning("the record of %s does not name its MLflow run: %s", node.name, error)


def _step(record: Record) -> int:
    """The step of what is known of a model once: its best epoch, or 0 where it was made in none."""
    step: int = record.details.get("best_epoch", 0)
    return step


def _figures(record: Record, metrics: Mapping[str, float]) -> dict[str, float]:
    """Figures of a model, under names that no curve of its epochs has.

    Figures of `val` are there as `best_val_…` whether there is a curve or not, so that all stages have one column.
    """
    curves = {name for row in record.details.get("history", ()) for name in row}
    best = {f"{BEST}{name}": value for name, value in metrics.items() if name in curves or name.startswith("val_")}
    return best | {name: value for name, value in metrics.items() if name not in curves}


def _why_not_done(outcomes: Sequence[NodeOutcome]) -> Iterator[str]:
    """A line for each node that failed, and then for each that was skipped."""
    for status in ("failed", "skipped"):
        for outcome in outcomes:
            if outcome.status == status:
                first_line, _, _ = (outcome.error or "").partition("\n")
                yield f"{outcome.name} {status}: {first_line}"


class NodeReporter:
    """Passes what a running stage says on to MLflow and to the view."""

    def __init__(
        self,
        tracker: Tracker,
        key: str,
        node: Node,
        view: "View",
        when_nearly_over: Callable[[], None],
        begin: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self._tracker, self._key, self._node, self._view = tracker, key, node, view
        self._when_nearly_over, self._begin = when_nearly_over, begin
        self._lock = threading.Lock()
        self._seconds_file = node.folder.with_name(f".{node.fingerprint}.seconds")
        """Beside the folder, whose files are the stage's: the seconds so far, for an attempt that resumes."""
        self._earlier_s = float(self._seconds_file.read_text()) if self._seconds_file.exists() else 0.0
        self._is_done = False
        self._since = time.time()
        self._began_at: float | None = None
        self.params: Mapping[str, Any] = {}
        """What the stage works with; to be set before it begins."""
        self.warnings: list[str] = []
        """What it was warned of, in order."""

    def began(self, at: float | None = None) -> None:
        with self._lock:
            if self._began_at is not None:
                return
            now = time.time()
            self._began_at = now if at is None else min(max(at, self._since), now)  # clocks of machines differ
        self._begin(self.params)
        self._view.started(self._node)

    @property
    def seconds(self) -> float:
        """How long the stage has worked, with the attempts that it resumes; waiting to begin does not count."""
        return self._earlier_s + self.seconds_of_attempt

    @property
    def seconds_of_attempt(self) -> float:
        return 0.0 if self._began_at is None else max(0.0, time.time() - self._began_at)

    def keep_seconds(self) -> None:
        """Let an attempt that resumes this one know how long it has worked."""
        aside = self._seconds_file.with_suffix(".tmp")
        with self._lock, suppress(OSError):  # a full disk ends the stage by itself, and this is one figure
            if not self._is_done:
                aside.write_text(f"{self.seconds:.3f}")
                aside.rename(self._seconds_file)

    def cut_off(self) -> None:
        """The stage failed or was interrupted, perhaps before it could begin."""
        self.began()
        self.keep_seconds()

    def forget_seconds(self, *, is_done: bool) -> None:
        """The node is done, or begins anew."""
        with self._lock:
            self._earlier_s, self._is_done = 0.0, is_done
            self._seconds_file.unlink(missing_ok=True)

    def _trial(self, trial: str) -> str:
        return f"{self._key}/{trial}"

    def metrics(self, values: Mapping[str, float], *, step: int, trial: str | None = None) -> None:
        self._tracker.metrics(self._key if trial is None else self._trial(trial), values, step=step)
        if trial is None:
            self._view.progress(self._node, {"epoch": step, **values})

    def trial_started(self, trial: str, params: Mapping[str, Any]) -> None:
        tags = {"heliostat.trial": trial}
        self._tracker.start_run(self._trial(trial), name=trial, parent=self._key, tags=tags, params=params)

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
        key = self._trial(trial)
        self._tracker.tags(key, {"heliostat.trial_status": status})
        if status != "failed" and metrics:
            self._tracker.metrics(key, {f"{BEST}{name}": metrics[name] for name in metrics}, step=best_epoch)
        if reason and status == "failed":
            self._tracker.error(key, reason)
        elif status == "stopped":  # which MLflow's pages mark as they mark a failed one; the note says which it is
            reason = reason or "the search was over"
            self._tracker.tags(key, {"heliostat.reason": reason, NOTE_TAG: f"**Stopped**, not failed: {reason}"})
        self._tracker.end_run(key, status=TRIAL_STATUS[status], seconds=seconds)

    def progress(self, **fields: Any) -> None:
        self._view.progress(self._node, fields)
        if fields.get("total") and fields["done"] == fields["total"] - 1:
            self._when_nearly_over()

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        self._tracker.tags(self._key, {"heliostat.warnings": "\n".join(self.warnings)})
        self._view.warned(self._node, text)
