"""Artifacts as files: into the folder of a run whose artifacts are local, and what both writers check first."""

import logging
import shutil
from pathlib import Path

from heliostat.tracking.events import Event

_log = logging.getLogger(__name__)


def is_gone(event: Event) -> bool:
    """Whether the file or folder that the event names no longer exists; then there is nothing left to deliver."""
    source = {"artifact": "path", "model": "folder"}.get(event.kind)
    if source is None or Path(event.data[source]).exists():
        return False
    _log.warning("not tracked: %s of %s is gone", event.data[source], event.key)
    return True


def copy_into(source: Path, folder: Path) -> None:
    """Copy a file, or a folder under its own name, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, folder / source.name, dirs_exist_ok=True)
    else:
        shutil.copyfile(source, folder / source.name)


def write_text(text: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
