"""Addresses of MLflow stores: which of them can be written, before anything runs.

MLflow 3.17 refuses folders of files ("in maintenance mode") unless MLFLOW_ALLOW_FILE_STORE is set. Events for such a
store would stay in the spool for good, so it is refused with the file.
"""

import os
import re
import tempfile
from importlib.metadata import entry_points
from pathlib import Path
from urllib.parse import unquote, urlsplit

from heliostat.errors import SpecError

SQLITE = "sqlite:///"
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
DATABRICKS = ("databricks", "databricks-uc", "uc")
"""Addresses by themselves, and schemes."""
ALLOWS_FILES = "MLFLOW_ALLOW_FILE_STORE"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(?=:)")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_MAGIC = b"SQLite format 3\0"
_INSTEAD = "write sqlite:///mlflow.db for a file beside the pipeline file, or http://HOST:5000 for a server"


def why_no_tracking_uri(uri: str) -> str | None:
    """Why MLflow cannot keep runs at `uri`, and what to write instead; None when it can."""
    scheme = _scheme(uri)
    if scheme is None or scheme == "file":
        if os.environ.get(ALLOWS_FILES, "").lower() in ("true", "1"):
            return None
        return f"MLflow no longer writes folders of files; {_INSTEAD} (mlflow migrate-filestore moves old runs)"
    if scheme == "sqlite":
        return _why_no_sqlite(uri)
    if scheme in ("http", "https"):
        return None if urlsplit(uri).hostname else f"it names no host; {_INSTEAD}"
    if scheme.partition("+")[0] in (*DATABASES, *DATABRICKS) or scheme in _plug_ins():
        return None
    return f"MLflow knows no store {scheme!r}; {_INSTEAD}"


def _why_no_sqlite(uri: str) -> str | None:
    path = uri.removeprefix(SQLITE)
    if not uri.startswith(SQLITE) or not path.strip("/"):
        return "an SQLite store is sqlite:///FILE, relative to the pipeline file, or sqlite:////absolute/FILE"
    if path == ":memory:":
        return "a store in memory ends with this process; name a file"
    return None


def check_place(uri: str) -> None:
    """Raise SpecError for an SQLite store whose file cannot be made or is something else. Makes its folder."""
    if not uri.startswith(SQLITE):
        return
    path = Path(uri.removeprefix(SQLITE))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        begins = _first_bytes(path, len(_MAGIC)) if path.exists() else _MAGIC
    except OSError as error:
        raise SpecError(f"tracking.uri: {path} cannot be written: {error.strerror}; name another file") from error
    if begins != _MAGIC:
        raise SpecError(f"tracking.uri: {path} is no SQLite database; name another file")


def _first_bytes(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        return file.read(count)


def resolved_uri(uri: str, root: Path) -> str:
    """`uri`, with a path in it that is relative taken from `root`."""
    scheme = _scheme(uri)
    if uri.startswith(SQLITE):
        return f"{SQLITE}{root / uri.removeprefix(SQLITE)}"
    if scheme is None or scheme == "file":
        path = Path(unquote(urlsplit(uri).path) if scheme else uri).expanduser()
        return (root / path).resolve().as_uri()
    return uri


def _scheme(uri: str) -> str | None:
    found = None if _DRIVE.match(uri) else _SCHEME.match(uri)
    return found.group().lower() if found else uri if uri in DATABRICKS else None


def _plug_ins() -> set[str]:
    return {point.name for point in entry_points(group="mlflow.tracking_store")}
