"""The history of runs in a store: one JSON document a run under `runs/`, written when it starts and when it ends."""

import itertools
import json
import shlex
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from heliostat.core.artifact import Record, records, write_json
from heliostat.errors import SpecError, nearest

STORES_NAMED = 3
"""The number of nearby stores that the error names when a folder holds none."""


def new_run_id(pipeline: str) -> str:
    """`mnist-20261125-031500-123`: sorts by time, and no two runs of a pipeline share it."""
    now = datetime.now()
    return f"{pipeline}-{now:%Y%m%d-%H%M%S}-{now.microsecond // 1000:03d}"


def check_store(storage: Path) -> None:
    """Raise SpecError unless `storage` is a store, with the stores that are near."""
    if _is_store(storage):
        return
    what = "no such folder" if not storage.is_dir() else "not a store: no run has written here"
    near = " or ".join(f"--storage {shlex.quote(str(found))}" for found in _stores_near(storage))
    advice = near or "go to the folder of the pipeline file, or pass its .heliostat"
    looked = storage.expanduser().absolute()
    raise SpecError(f"--storage {storage}: {looked} is {what}; {'try ' if near else ''}{advice}")


def _is_store(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("runs", "spool", "mlflow.db")) or any(records(folder))


def _stores_near(storage: Path) -> list[Path]:
    """Below the folder that was named and the working directory, and beside the folders that this one lies in."""
    here = Path.cwd()
    patterns = (".heliostat", "*/.heliostat", "*/*/.heliostat")
    below = [found for folder in (storage, here) for pattern in patterns for found in folder.glob(pattern)]
    above = [folder / ".heliostat" for folder in here.parents]
    found = dict.fromkeys(folder.resolve() for folder in [*below, *above] if _is_store(folder))
    return [folder.relative_to(here) if folder.is_relative_to(here) else folder for folder in found][:STORES_NAMED]


def write_run(storage: Path, run_id: str, document: Mapping[str, Any]) -> Path:
    """Write a run's document; the file that it is in."""
    path = storage / "runs" / f"{run_id}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"run": run_id, **document})
    return path


def read_runs(storage: Path) -> list[dict[str, Any]]:
    """Every run of the store, newest first. One that was killed still says `unfinished`."""
    return list(_newest_first(storage))


def cut_off(storage: Path, pipeline: str) -> list[dict[str, Any]]:
    """The runs of a pipeline that were killed (or still go on) since one came to its end, newest first.

    What MLflow says of them is not complete.
    """
    runs = (run for run in _newest_first(storage) if run["pipeline"] == pipeline)
    return list(itertools.takewhile(lambda run: run["status"] == "unfinished", runs))


def _newest_first(storage: Path) -> Iterator[dict[str, Any]]:
    for path in sorted((storage / "runs").glob("*.json"), key=lambda p: p.stat().st_mtime, reverse=True):
        yield json.loads(path.read_text(encoding="utf-8"))


def find(storage: Path, name: str) -> dict[str, Any] | tuple[Path, Record]:
    """The run, or the finished node (by fingerprint, its beginning, its name or its path), that `name` means.

    Raises SpecError when the store has neither; of several nodes of that name, the newest is meant.
    """
    runs = {document["run"]: document for document in read_runs(storage)}
    if name in runs:
        return runs[name]
    nodes = list(records(storage))
    for folder, record in reversed(nodes):
        by_fingerprint = len(name) >= 6 and record.fingerprint.startswith(name)
        if by_fingerprint or name == record.node or Path(name).resolve() == folder.resolve():
            return folder, record
    known = [*runs, *(record.node for _, record in nodes)]
    raise SpecError(f"{storage} has no run or node {name!r}{nearest(name, known)}")
