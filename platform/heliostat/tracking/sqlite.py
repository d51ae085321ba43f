"""Runs written straight into the tables of an embedded MLflow store, many runs in one transaction.

MLflow's own client needs 29 ms to create a run, 73 ms for a batch of metrics and 25 ms to end the run on SQLite, and
2.5 s to be imported; this needs less than a millisecond for all of it. The rows are those that
`mlflow.store.tracking.sqlalchemy_store` writes, the tests read them with the real client, and an older or newer schema
that lacks one of the columns below is reported, not guessed at. A run's id is derived from its key, so that writing
anything a second time meets the row that is there already.
"""

import math
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from heliostat.core.disk import why_not_written
from heliostat.tracking.artifacts import copy_into, is_gone, write_text
from heliostat.tracking.database import create_database
from heliostat.tracking.events import (
    ERROR_FILE,
    ERROR_TAG,
    FAILED_NOTE,
    KEY_TAG,
    NOTE_TAG,
    PARENT_TAG,
    Event,
)
from heliostat.tracking.model import log_in_own_process
from heliostat.tracking.writer import Target, UnavailableError, database_path, run_id_known

BUSY_S = 20

_EXPERIMENT = """
    INSERT INTO experiments (name, artifact_location, lifecycle_stage, creation_time, last_update_time)
    VALUES (:name, :location, 'active', :now, :now) ON CONFLICT DO NOTHING"""
_RUN = """
    INSERT INTO runs (run_uuid, name, source_type, source_name, entry_point_name, user_id, status, start_time,
                      source_version, lifecycle_stage, artifact_uri, experiment_id)
    VALUES (:run, :name, 'UNKNOWN', '', '', :user, 'RUNNING', :time, '', 'active', :artifacts, :experiment)
    ON CONFLICT (run_uuid) DO UPDATE SET status = 'RUNNING', end_time = NULL, lifecycle_stage = 'active',
                                         deleted_time = NULL"""
_END = """
    UPDATE runs SET status = :status, end_time = coalesce(start_time + :worked_ms, :time) WHERE run_uuid = :run"""
_END_TREE = """
    UPDATE runs SET status = :status, end_time = :time
    WHERE status = 'RUNNING' AND experiment_id = :experiment AND run_uuid IN (
        SELECT run_uuid FROM tags
        WHERE key = :key_tag AND (value = :key OR substr(value, 1, length(:key) + 1) = :key || '/'))"""
_TAG = """
    INSERT INTO tags (run_uuid, key, value) VALUES (:run, :key, :value)
    ON CONFLICT (key, run_uuid) DO UPDATE SET value = excluded.value"""
_NO_TAG = "DELETE FROM tags WHERE run_uuid = :run AND key = :key"
_NO_NOTE = "DELETE FROM tags WHERE run_uuid = :run AND key = :key AND substr(value, 1, length(:of)) = :of"
_PARAM = "INSERT INTO params (run_uuid, key, value) VALUES (:run, :key, :value) ON CONFLICT DO NOTHING"
_METRIC = """
    INSERT INTO metrics (run_uuid, key, value, is_nan, step, timestamp)
    SELECT :run, :key, :value, :is_nan, :step, :time
    WHERE NOT EXISTS (SELECT 1 FROM metrics WHERE run_uuid = :run AND key = :key AND step = :step)"""
_LATEST = """
    INSERT INTO latest_metrics (run_uuid, key, value, is_nan, step, timestamp)
    VALUES (:run, :key, :value, :is_nan, :step, :time)
    ON CONFLICT (key, run_uuid) DO UPDATE
    SET value = excluded.value, is_nan = excluded.is_nan, step = excluded.step, timestamp = excluded.timestamp
    WHERE excluded.step > latest_metrics.step"""

Row = dict[str, Any]


class SqliteWriter:
    """A `Writer` for `sqlite:///PATH`. New experiments keep their artifacts in `mlartifacts` beside the database."""

    def __init__(self, target: Target) -> None:
        path = database_path(target.uri)
        create_database(path)
        self._target = target
        self._folder = path.parent
        with _database_errors(self._folder):
            self._db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")  # `mlflow ui` reads while this writes
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._experiment, self._artifacts = self._find_experiment(path.parent / "mlartifacts")
        self._artifacts_folder = _local(self._artifacts)

    def deliver(self, events: Sequence[Event]) -> Mapping[str, str]:
        states: list[tuple[str, Row]] = []  # starts and ends, which must keep their order
        tags: dict[tuple[str, str], str | None] = {}  # by run and name; None for one that goes
        params: list[Row] = []
        metrics: list[Row] = []
        notes: list[Row] = []
        trees: list[Row] = []
        started: dict[str, str] = {}
        for event in events:
            run, data = self._run_id(event.key), event.data
            match event.kind:
                case "start":
                    started[event.key] = run
                    states.append((_RUN, self._run_row(event)))
                    tags |= _named(run, {ERROR_TAG: None, **self._run_tags(event)})
                    tags.pop((run, NOTE_TAG), None)
                    notes.append({"run": run, "key": NOTE_TAG, "of": FAILED_NOTE})
                    params += _rows(run, data["params"])
                case "metrics":
                    metrics += _metric_rows(run, event)
                case "params":
                    params += _rows(run, data["values"])
                case "tags":
                    tags |= _named(run, data["values"])
                case "end":
                    states.append((_END, _end_row(run, event)))
                case "end_tree":
                    trees.append(self._tree_row(event))
                case "artifact" | "text" | "model":
                    pass
        kept = [{"run": run, "key": key, "value": value} for (run, key), value in tags.items() if value is not None]
        gone = [{"run": run, "key": key} for (run, key), value in tags.items() if value is None]
        with _database_errors(self._folder), self._transaction():
            for statement, row in states:
                self._db.execute(statement, row)
            for statement, rows in (
                (_NO_TAG, gone),
                (_NO_NOTE, notes),
                (_TAG, kept),
                (_PARAM, params),
                (_METRIC, metrics),
                (_LATEST, metrics),
            ):
                self._db.executemany(statement, rows)
            self._db.executemany(_END_TREE, trees)  # last: it looks for tags that may just have been written
        for event in events:
            self._write_files(event)
        return started

    def close(self) -> None:
        self._db.close()

    def _find_experiment(self, artifacts: Path) -> tuple[int, str]:
        row = {"name": self._target.experiment, "location": artifacts.as_uri(), "now": time.time_ns() // 1_000_000}
        self._db.execute(_EXPERIMENT, row)
        found = "SELECT experiment_id, artifact_location, lifecycle_stage FROM experiments WHERE name = :name"
        experiment_id, location, stage = self._db.execute(found, row).fetchone()
        if stage != "active":
            raise UnavailableError(
                f"the experiment {self._target.experiment!r} was deleted in MLflow; to have it back: "
                f"mlflow experiments restore --experiment-id {experiment_id}"
            )
        return experiment_id, location

    def _run_id(self, key: str) -> str:
        run_id = run_id_known(self._target, key)
        assert run_id is not None
        return run_id

    def _run_row(self, event: Event) -> Row:
        run = self._run_id(event.key)
        return {
            "run": run,
            "name": event.data["name"],
            "user": event.data["tags"].get("mlflow.user", ""),
            "time": event.time_ms,
            "artifacts": f"{self._artifacts}/{run}/artifacts",
            "experiment": self._experiment,
        }

    def _tree_row(self, event: Event) -> Row:
        return {
            "key": event.key,
            "key_tag": KEY_TAG,
            "status": event.data["status"],
            "time": event.time_ms,
            "experiment": self._experiment,
        }

    def _run_tags(self, event: Event) -> dict[str, str]:
        parent = event.data["parent"]
        return {
            **event.data["tags"],
            "mlflow.runName": event.data["name"],
            KEY_TAG: event.key,
            **({PARENT_TAG: self._run_id(parent)} if parent is not None else {}),
        }

    def _write_files(self, event: Event) -> None:
        run, data = self._run_id(event.key), event.data
        if event.kind not in ("start", "artifact", "text", "model") or is_gone(event):
            return
        place = self._artifacts_folder / run / "artifacts"
        try:
            if event.kind == "start":
                (place / ERROR_FILE).unlink(missing_ok=True)
            elif event.kind == "model":
                log_in_own_process(self._target.uri, run, data)
            elif event.kind == "text":
                write_text(data["text"], place / data["name"])
            else:
                copy_into(Path(data["path"]), place / (data["folder"] or ""))
        except OSError as error:
            raise UnavailableError(why_not_written(error, place) or str(error)) from error

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # SQLite has rolled back by itself where, say, the disk was full
                self._db.execute("ROLLBACK")
            raise


def _local(artifacts: str) -> Path:
    parts = urlsplit(artifacts)
    if parts.scheme not in ("", "file"):
        raise UnavailableError(
            f"the experiment's artifacts are at {artifacts}; that takes a tracking server in between"
        )
    return Path(unquote(parts.path))


@contextmanager
def _database_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise UnavailableError(why_not_written(error, folder) or str(error)) from error


def _end_row(run: str, event: Event) -> Row:
    seconds = event.data.get("seconds")  # events of older journals have none
    worked_ms = None if seconds is None else round(1000 * seconds)
    return {"run": run, "status": event.data["status"], "time": event.time_ms, "worked_ms": worked_ms}


def _named(run: str, values: Mapping[str, str | None]) -> dict[tuple[str, str], str | None]:
    return {(run, key): value for key, value in values.items()}


def _rows(run: str, values: Mapping[str, str]) -> list[Row]:
    return [{"run": run, "key": key, "value": value} for key, value in values.items()]


def _metric_rows(run: str, event: Event) -> list[Row]:
    step, rows = event.data["step"], []
    for key, value in event.data["values"].items():
        number, is_nan = _storable(value)
        rows.append({"run": run, "key": key, "value": number, "is_nan": is_nan, "step": step, "time": event.time_ms})
    return rows


def _storable(value: float) -> tuple[float, bool]:
    """As MLflow's `SqlAlchemyStore.sanitize_metric_value`: NaN is 0 with a flag, infinity the largest float."""
    if math.isnan(value):
        return 0.0, True
    return max(-1.7976931348623157e308, min(value, 1.7976931348623157e308)), False
