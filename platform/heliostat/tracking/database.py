"""A new MLflow database in SQLite, quickly.

MLflow makes one by running all its migrations since 2018: 5 s of CPU, imports included. That is done once per MLflow
version, in a process of its own (its log lines, telemetry and global state stay there), and the empty database is kept
in the user's cache folder and copied from then on.
"""

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import uuid
from importlib.metadata import version
from pathlib import Path

from heliostat.core.disk import why_not_written
from heliostat.tracking import quiet
from heliostat.tracking.writer import SQLITE, UnavailableError


def create_database(path: Path) -> None:
    """Make an empty MLflow database at `path` unless there is one. Raises `UnavailableError`."""
    if path.exists():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _create_aside_and_link(path)
    except (OSError, sqlite3.Error) as error:
        raise UnavailableError(why_not_written(error, path.parent) or str(error)) from error


def _create_aside_and_link(path: Path) -> None:
    """Nobody ever sees half a database, and of two processes that make one at once only the first one's stays."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    cached = _cache_folder() / f"mlflow-{version('mlflow')}.db"
    try:
        if cached.exists():
            shutil.copyfile(cached, aside)
        else:
            _migrate(aside)
            _keep(aside, cached)
        _use_wal(aside)
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _use_wal(database: Path) -> None:
    """Before others see it: SQLite lets nobody wait for the switch, so the second of two writers would fail at once."""
    with contextlib.closing(sqlite3.connect(database)) as db:
        db.execute("PRAGMA journal_mode = WAL")


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "heliostat"


def _migrate(path: Path) -> None:
    command = [sys.executable, "-m", "mlflow", "db", "upgrade", f"{SQLITE}{path}"]
    done = subprocess.run(command, env=quiet.environment(), capture_output=True, text=True, start_new_session=True)
    if done.returncode:
        raise UnavailableError(f"mlflow db upgrade failed: {done.stderr.strip()[-500:]}")


def _keep(database: Path, cached: Path) -> None:
    aside = cached.with_name(f"{cached.name}.{uuid.uuid4().hex}")
    with contextlib.suppress(
        OSError
    ):  # without a writable cache the next new database takes seconds again, that is all
        cached.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(database, aside)
        aside.replace(cached)
