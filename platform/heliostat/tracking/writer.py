"""The protocol between the tracker and a store of MLflow, and the choice of the writer by the store's address."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from heliostat.core.credentials import use_for_mlflow
from heliostat.tracking.events import Event

SQLITE = "sqlite:///"


class UnavailableError(Exception):
    """The store cannot take anything now: nobody answers, it is locked, its disk is full. To be tried again later."""


@dataclass(frozen=True)
class Target:
    """Where runs go: the experiment of that name in the MLflow store at `uri`."""

    uri: str
    experiment: str


class Writer(Protocol):
    """Writes events to one kind of MLflow store."""

    def deliver(self, events: Sequence[Event]) -> Mapping[str, str]:
        """Write the events, in order, and give the MLflow run id of every key that was started among them.

        Raises `UnavailableError` when some or all of them are not written; writing events a second time changes
        nothing. An event that the store refuses for good is logged and passed over: it must not hold up those after it.
        """

    def close(self) -> None: ...


def open_writer(target: Target) -> Writer:
    """Raises `UnavailableError`."""
    target = replace(target, uri=use_for_mlflow(target.uri))
    if target.uri.startswith(SQLITE):
        from heliostat.tracking.sqlite import SqliteWriter

        return SqliteWriter(target)
    from heliostat.tracking.client import ClientWriter  # imports mlflow: 2.5 s of CPU

    return ClientWriter(target)


def run_id_known(target: Target, key: str) -> str | None:
    """The MLflow run id of `key` where it follows from the key, as in SQLite; a server makes its own."""
    if not target.uri.startswith(SQLITE):
        return None
    return uuid.uuid5(uuid.NAMESPACE_URL, f"heliostat:{target.experiment}:{key}").hex


def absolute_uri(uri: str) -> str:
    """`uri`, with the path of an SQLite store made absolute: it will be read by other processes, in other folders."""
    return f"{SQLITE}{database_path(uri)}" if uri.startswith(SQLITE) else uri.rstrip("/")


def database_path(uri: str) -> Path:
    return Path(uri.removeprefix(SQLITE)).absolute()
