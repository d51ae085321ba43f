"""Runs written through `MlflowClient`: for a tracking server, and for every other store that MLflow knows.

The store itself is asked what is there already: a run is found again by its tag `heliostat.key`, and with it its
parameters and the steps of its metrics. What was asked is remembered until a request fails; after that nobody knows
what of it arrived, and the store is asked anew.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from heliostat.tracking import quiet

quiet.silence()

import mlflow  # noqa: E402
import requests  # noqa: E402
from mlflow.entities import Metric, Param, RunTag  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository  # noqa: E402

from heliostat.tracking.artifacts import is_gone  # noqa: E402
from heliostat.tracking.events import (  # noqa: E402
    ERROR_FILE,
    ERROR_TAG,
    FAILED_NOTE,
    KEY_TAG,
    NOTE_TAG,
    PARENT_TAG,
    Event,
)
from heliostat.tracking.model import log_in_own_process  # noqa: E402
from heliostat.tracking.writer import Target, UnavailableError  # noqa: E402

MAX_RUNNING = 1000
"""More trials than these are not under way at once."""
MAX_METRICS = 800
MAX_PARAMS = 100  # and as many tags; the three together must not pass 1000

_log = logging.getLogger(__name__)


class _RefusedError(Exception):
    """The store will never take this."""


@dataclass
class _Run:
    """A run of the store: what it has, and what of this batch it is still to be given."""

    run_id: str
    start_ms: int
    failed_at: str | None = None
    """Where its artifacts are, if an error is among them."""
    failed_note: bool = False
    """Its description says what it failed by."""
    known_params: set[str] = field(default_factory=set)
    known_steps: set[tuple[str, int]] = field(default_factory=set)
    metrics: list[Metric] = field(default_factory=list)
    params: list[Param] = field(default_factory=list)
    tags: list[RunTag] = field(default_factory=list)


class ClientWriter:
    """A `Writer` for any store that `MlflowClient` opens."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._runs: dict[str, _Run] = {}
        try:
            with errors_of_the_store():
                self._client = mlflow.MlflowClient(tracking_uri=target.uri)
                self._experiment = self._find_experiment()
        except _RefusedError as error:
            raise UnavailableError(str(error)) from error

    def deliver(self, events: Sequence[Event]) -> Mapping[str, str]:
        started: dict[str, str] = {}
        try:
            for event in events:
                with _passed_over_if_refused(event.kind, event.key), errors_of_the_store():
                    self._take(event, started)
            for key in {event.key for event in events} & self._runs.keys():
                self._flush(self._runs[key])
        except UnavailableError:
            self._runs.clear()
            raise
        return started

    def close(self) -> None:
        """Nothing is held open."""

    def _take(self, event: Event, started: dict[str, str]) -> None:
        data = event.data
        if event.kind == "start":
            self._runs[event.key] = self._start(event)
            started[event.key] = self._runs[event.key].run_id
        if event.kind == "end_tree":
            self._end_tree(event)
            return
        run = self._run(event.key)
        match event.kind:
            case "start":
                _add_params(run, data["params"])
            case "metrics":
                _add_metrics(run, event)
            case "params":
                _add_params(run, data["values"])
            case "tags":
                run.tags += [RunTag(k, v) for k, v in data["values"].items()]
            case "artifact":
                self._log_artifact(run, event)
            case "text":
                self._client.log_text(run.run_id, data["text"], data["name"])
            case "model":
                if not is_gone(event):
                    log_in_own_process(self._target.uri, run.run_id, data)
            case "end":
                self._flush(run)
                seconds = data.get("seconds")  # events of older journals have none
                end_ms = event.time_ms if seconds is None else run.start_ms + round(1000 * seconds)
                self._client.set_terminated(run.run_id, data["status"], end_ms)

    def _end_tree(self, event: Event) -> None:
        """The store finds what is running; which of it is in the tree is seen here, whatever `%` and `_` mean there."""
        running = f"attributes.status = 'RUNNING' and tags.`{KEY_TAG}` LIKE {_quoted(f'{event.key}%')}"
        for found in self._client.search_runs([self._experiment], running, max_results=MAX_RUNNING):
            if f"{found.data.tags[KEY_TAG]}/".startswith(f"{event.key}/"):
                self._client.set_terminated(found.info.run_id, event.data["status"], event.time_ms)

    def _find_experiment(self) -> str:
        found = self._client.get_experiment_by_name(self._target.experiment)
        if found is None:
            try:
                return str(self._client.create_experiment(self._target.experiment))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process has just made it
                    raise
                found = self._client.get_experiment_by_name(self._target.experiment)
        if found.lifecycle_stage != "active":
            raise UnavailableError(
                f"the experiment {self._target.experiment!r} was deleted in MLflow; to have it back: "
                f"mlflow experiments restore --experiment-id {found.experiment_id}"
            )
        return str(found.experiment_id)

    def _start(self, event: Event) -> _Run:
        data = event.data
        tags = {**data["tags"], KEY_TAG: event.key}
        if data["parent"] is not None:
            tags[PARENT_TAG] = self._run(data["parent"]).run_id
        if run := self._find(event.key):
            self._client.update_run(run.run_id, status="RUNNING")
            if run.failed_at is not None:
                self._forget_error(run.run_id, run.failed_at)
            if run.failed_note:
                self._client.delete_tag(run.run_id, NOTE_TAG)
            run.tags += [RunTag(k, v) for k, v in tags.items()]
            return run
        created = self._client.create_run(self._experiment, event.time_ms, tags, data["name"])
        return _Run(created.info.run_id, event.time_ms)

    def _run(self, key: str) -> _Run:
        run = self._runs.get(key) or self._find(key)
        if run is None:
            raise _RefusedError("no run of that key was started")
        self._runs[key] = run
        return run

    def _find(self, key: str) -> _Run | None:
        found = self._client.search_runs([self._experiment], f"tags.`{KEY_TAG}` = {_quoted(key)}", max_results=1)
        if not found:
            return None
        info, data = found[0].info, found[0].data
        run_id = info.run_id
        steps = {(m.key, m.step) for name in data.metrics for m in self._client.get_metric_history(run_id, name)}
        failed_at = info.artifact_uri if ERROR_TAG in data.tags else None
        failed_note = data.tags.get(NOTE_TAG, "").startswith(FAILED_NOTE)
        return _Run(run_id, info.start_time, failed_at, failed_note, set(data.params), steps)

    def _forget_error(self, run_id: str, artifacts: str) -> None:
        with _passed_over_if_refused(ERROR_FILE, run_id), errors_of_the_store():
            get_artifact_repository(artifacts, tracking_uri=self._target.uri).delete_artifacts(ERROR_FILE)
        self._client.delete_tag(run_id, ERROR_TAG)

    def _flush(self, run: _Run) -> None:
        while run.metrics or run.params or run.tags:
            batch = run.metrics[:MAX_METRICS], run.params[:MAX_PARAMS], run.tags[:MAX_PARAMS]
            del run.metrics[:MAX_METRICS], run.params[:MAX_PARAMS], run.tags[:MAX_PARAMS]
            with _passed_over_if_refused("values", run.run_id), errors_of_the_store():
                self._client.log_batch(run.run_id, *batch)

    def _log_artifact(self, run: _Run, event: Event) -> None:
        if is_gone(event):
            return
        source, folder = Path(event.data["path"]), event.data["folder"]
        if source.is_dir():
            self._client.log_artifacts(run.run_id, str(source), str(Path(folder or "") / source.name))
        else:
            self._client.log_artifact(run.run_id, str(source), folder)


def _quoted(text: str) -> str:
    quote = '"' if "'" in text else "'"
    return f"{quote}{text}{quote}"


def _add_metrics(run: _Run, event: Event) -> None:
    step = event.data["step"]
    for name, value in event.data["values"].items():
        if (name, step) not in run.known_steps:
            run.known_steps.add((name, step))
            run.metrics.append(Metric(name, value, event.time_ms, step))


def _add_params(run: _Run, values: Mapping[str, Any]) -> None:
    run.params += [Param(name, value) for name, value in values.items() if name not in run.known_params]
    run.known_params.update(values)


@contextmanager
def _passed_over_if_refused(what: str, of: str) -> Iterator[None]:
    try:
        yield
    except _RefusedError as error:
        _log.warning("not tracked: %s of %s: %s", what, of, error)


@contextmanager
def errors_of_the_store() -> Iterator[None]:
    """Tell a store that is away, or to which the way is barred for now, from one that refuses what it is sent."""
    try:
        yield
    except MlflowException as error:
        status = error.get_http_status_code()
        raise (UnavailableError if _may_pass(status) else _RefusedError)(str(error)) from error
    except requests.HTTPError as error:
        passes = error.response is None or _may_pass(error.response.status_code)
        raise (UnavailableError if passes else _RefusedError)(str(error)) from error
    except (requests.RequestException, OSError) as error:
        raise UnavailableError(str(error)) from error


def _may_pass(status: int) -> bool:
    return status >= 500 or status in (401, 403, 408, 429)
