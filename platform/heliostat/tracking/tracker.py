"""Tracking that never waits for its store and never kills a run.

    caller --> journal on disk and backlog --> delivering thread --batches--> a writer

The caller's methods write an event to the journal and return: what was told before a process is killed is never lost.
A thread hands batches to the store and tries again, less and less often, while the store is away. What is not delivered
when the process ends is delivered by the next tracker on the same spool, or by `replay`. A run is named by the caller's
own key: the same key goes on with the same MLflow run.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heliostat.core.disk import why_not_written
from heliostat.tracking.context import source_tags
from heliostat.tracking.events import ERROR_FILE, ERROR_TAG, FAILED_NOTE, NOTE_TAG, Event, Kind, Status, cleaned
from heliostat.tracking.spool import Journal, Spooled, left_behind, mark_delivered
from heliostat.tracking.writer import Target, UnavailableError, Writer, absolute_uri, open_writer, run_id_known

if TYPE_CHECKING:
    import numpy as np

BATCH_EVENTS = 5000
BATCH_S = 0.5
MAX_PAUSE_S = 30.0

_log = logging.getLogger(__name__)


class Tracker:
    """The way to one experiment of one MLflow store.

    Every method may be called from any thread, and waits for nothing but the disk that the spool is on.
    """

    def __init__(self, uri: str, *, experiment: str, spool: Path) -> None:
        self._target = Target(absolute_uri(uri), experiment)
        self._spool = spool
        self._source = source_tags()
        self._changed = threading.Condition()  # guards all below
        self._backlog: deque[Spooled] = deque()
        self._run_ids: dict[str, str] = {}
        self._why_waiting: str | None = None
        self._closing = False
        self._stopped = False
        self._journals: list[Journal] = []
        """Those of earlier processes, and last this tracker's own."""
        self._journal = self._adopt_and_open()
        self._deliverer = threading.Thread(target=self._deliver_events, name="tracking-deliver", daemon=True)
        self._deliverer.start()

    def start_run(
        self,
        key: str,
        *,
        name: str,
        parent: str | None = None,
        tags: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> None:
        """Start the run of `key`, or go on with it, without its error. `parent` is the key of the run above it."""
        self._put(
            "start", key, name=name, parent=parent, tags={**self._source, **(tags or {})}, params=dict(params or {})
        )

    def metrics(self, key: str, values: Mapping[str, float], *, step: int) -> None:
        """Metrics of one step. A step that the run already has stays as it is."""
        self._put("metrics", key, values=dict(values), step=step)

    def params(self, key: str, values: Mapping[str, Any]) -> None:
        """Parameters; nested ones get dotted names. One that the run already has stays as it is."""
        self._put("params", key, values=dict(values))

    def tags(self, key: str, values: Mapping[str, Any]) -> None:
        self._put("tags", key, values=dict(values))

    def error(self, key: str, reason: str) -> None:
        """What the run failed by: the first line as a tag, all of it as a text and as the description."""
        self.text(key, reason, ERROR_FILE)
        note = f"{FAILED_NOTE}\n\n```\n{reason}\n```"
        self.tags(key, {ERROR_TAG: reason.partition("\n")[0], NOTE_TAG: note})

    def artifact(self, key: str, path: Path, folder: str | None = None) -> None:
        """A file, or a folder with all that is in it. It is read later: it must stay where it is."""
        self._put("artifact", key, path=str(path.absolute()), folder=folder)

    def text(self, key: str, text: str, name: str) -> None:
        """A text as an artifact, named `name`."""
        self._put("text", key, text=text, name=name)

    def log_model(
        self,
        key: str,
        model_folder: Path,
        *,
        input_example: "np.ndarray[Any, Any]",
        output_example: "np.ndarray[Any, Any]",
    ) -> None:
        """A Heliostat model folder as an MLflow model, which `mlflow.pyfunc.load_model("runs:/RUN_ID/model")` loads.

        `input_example` is a small batch, axis 0 first, and `output_example` what the model gives for it. The folder is
        read later: it must stay where it is.
        """
        folder = str(model_folder.absolute())
        self._put("model", key, folder=folder, example=input_example, outputs=output_example)

    def end_run(self, key: str, *, status: Status, seconds: float | None = None) -> None:
        """End a run: now, or at the time by which MLflow shows `seconds` as its duration.

        Those are of the work alone, while a run may wait in between, or go on on another day.
        """
        self._put("end", key, status=status, seconds=seconds)

    def end_tree(self, key: str, *, status: Status) -> None:
        """End all that is still running of the run of `key` and of those below it, whose keys are `KEY/…`.

        For what another process began and nobody goes on with: of that tree nothing may be started in the meantime.
        """
        self._put("end_tree", key, status=status)

    def run_id(self, key: str, timeout_s: float) -> str | None:
        """The MLflow run id of `key`: at once where it follows from the key, as on SQLite.

        Else as soon as the run has been started in the store; None when that takes longer.
        """
        known = run_id_known(self._target, key)
        if known is not None:
            return known
        with self._changed:
            self._changed.wait_for(lambda: key in self._run_ids or self._stopped, timeout_s)
            return self._run_ids.get(key)

    def close(self, *, timeout_s: float = 60.0) -> int:
        """Deliver what is left. Returns the number of events that wait in the spool; `lost` says what is not there.

        Waits for `timeout_s` at most, and not at all for a store that is away.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._deliverer.join(timeout_s)
        with self._changed:
            return sum(spooled.journal is not None for spooled in self._backlog)

    @property
    def why_waiting(self) -> str | None:
        """Why the store took nothing when it was last asked; None if it took all."""
        with self._changed:
            return self._why_waiting

    @property
    def lost(self) -> int:
        """After `close`: the number of events that neither the store nor the spool has taken."""
        with self._changed:
            return sum(spooled.journal is None for spooled in self._backlog)

    def _put(self, kind: Kind, key: str, **data: Any) -> None:
        try:
            event = cleaned(Event(kind, key, time.time_ns() // 1_000_000, data))
        except (TypeError, ValueError) as error:
            _log.warning("not tracked: %s of %s: %s", kind, key, error)
            return
        with self._changed:
            if not self._backlog:
                self._changed.notify_all()
            self._backlog.append(self._spooled(event))

    def _spooled(self, event: Event) -> Spooled:
        if self._journal:
            try:
                return self._journal.append(event)
            except OSError as error:
                self._go_on_without_spool(error)
        return Spooled(event)

    def _adopt_and_open(self) -> Journal | None:
        """Put first what earlier processes left behind for this target, and give a journal for what comes now."""
        try:
            for journal in left_behind(self._spool):
                if journal.target == self._target:
                    self._journals.append(journal)
                    self._backlog.extend(journal.undelivered())
                else:
                    journal.release()
            self._journals.append(Journal.create(self._spool, self._target))
        except OSError as error:
            self._go_on_without_spool(error)
            return None
        return self._journals[-1]

    def _go_on_without_spool(self, error: OSError) -> None:
        why = why_not_written(error, self._spool) or error
        _log.warning("tracking goes on without its spool %s: %s", self._spool, why)
        self._journal = None

    # ---- the delivering thread

    def _deliver_events(self) -> None:
        try:
            self._deliver_until_closed()
        except Exception:
            _log.exception("tracking has stopped; what is not in MLflow yet stays in %s", self._spool)
        finally:
            with self._changed:
                self._stopped = True
                self._changed.notify_all()

    def _deliver_until_closed(self) -> None:
        writer: Writer | None = None
        pause_s = BATCH_S
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._backlog or self._closing)
                self._changed.wait_for(lambda: self._closing, pause_s)  # the batch fills, or the store comes back
                batch = list(islice(self._backlog, BATCH_EVENTS))
                closing = self._closing
            if not batch:
                break
            try:
                writer = writer or open_writer(self._target)
                run_ids = writer.deliver([spooled.event for spooled in batch])
            except UnavailableError as error:
                with self._changed:
                    self._why_waiting = str(error).partition("\n")[0]
                if pause_s == BATCH_S:
                    place = self._spool if self._journal else "memory only"
                    _log.warning("%s takes nothing now; events are kept in %s: %s", self._target.uri, place, error)
                if closing:
                    break
                pause_s = min(2 * pause_s, MAX_PAUSE_S)
                continue
            pause_s = BATCH_S
            with self._changed:
                self._why_waiting = None
                for _ in batch:
                    self._backlog.popleft()
                self._run_ids.update(run_ids)
                self._changed.notify_all()
            self._mark(batch)
        if writer:
            writer.close()
        for journal in self._journals:
            journal.release()

    def _mark(self, batch: Sequence[Spooled]) -> None:
        try:
            mark_delivered(batch)
        except OSError as error:  # the batch will be delivered a second time, which changes nothing
            _log.warning("the spool %s cannot be written: %s", self._spool, error)
