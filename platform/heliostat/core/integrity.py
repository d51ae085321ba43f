"""Whether the files of an artifact are those that its record tells of: names that stay in the folder, and digests.

A record can come from elsewhere, so its names are not to be trusted: one that leads out of the folder is refused before
anything is read or copied. A digest is of the whole file. What was found to match is noted beside the folder with the
file's size, times and inode, all of which a second look compares first, so that `plan` reads a file once and not each
time. A note is no proof against somebody who may write to the store; `verify` reads every byte.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from heliostat.core.carrier import Files
from heliostat.errors import ArtifactError

DIGEST: Final = re.compile(r"[0-9a-f]{64}")


def check_names(names: Iterable[str], *, place: str) -> None:
    """Raise ArtifactError for a name that is no plain path below a folder: absolute, with `..` or odd characters."""
    for name in names:
        parts = name.split("/") if isinstance(name, str) else [""]
        if any(part in ("", ".", "..") for part in parts) or not name.isprintable() or "\\" in name:
            raise ArtifactError(f"{place}: {name!r} is not the name of a file below that folder; do not use it")


def check_files(files: Any, *, place: str) -> None:
    """Raise ArtifactError unless these are names below a folder, each with a digest and a size."""
    if not isinstance(files, Mapping):
        raise ArtifactError(f"{place}: the files are no mapping of names to digests")
    check_names(files, place=place)
    for name, entry in files.items():
        digest, size = (entry.get(key) for key in ("sha256", "bytes")) if isinstance(entry, Mapping) else (None, None)
        if not (isinstance(digest, str) and DIGEST.fullmatch(digest) and isinstance(size, int)):
            raise ArtifactError(f"{place}: {name} has no sha256 and size")


def check_inside(folder: Path, names: Iterable[str]) -> None:
    """Raise ArtifactError for a name that a symbolic link leads out of `folder`."""
    below = {"/".join(parts[: end + 1]) for parts in (name.split("/") for name in names) for end in range(len(parts))}
    for path in sorted(f"{folder}/{part}" for part in below):
        if os.path.islink(path) and not (target := Path(path).resolve()).is_relative_to(folder.resolve()):
            raise ArtifactError(f"{path} is a link that leads to {target}, outside of the artifact")


def digest_of(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file."""
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": os.fstat(file.fileno()).st_size}


def lacking(folder: Path, files: Files, *, elsewhere: Mapping[Path, int] = MappingProxyType({})) -> list[str]:
    """The names of files that are at their recorded sizes neither in `folder` nor `elsewhere`, from where they come."""
    check_inside(folder, files)
    return [n for n, entry in files.items() if entry["bytes"] not in (_size(folder / n), elsewhere.get(folder / n))]


def damaged(folder: Path, files: Files, *, elsewhere: Mapping[Path, int] = MappingProxyType({})) -> list[str]:
    """The names of files that have their recorded size and another content, and that cannot come from `elsewhere`.

    `folder` is a node's. A file whose stamp is that of an earlier look is not read again.
    """
    notes = _read_notes(folder)
    now = {name: [*_stamp(folder / name), entry["sha256"]] for name, entry in _of_right_size(folder, files).items()}
    unknown = {name: files[name] for name, stamp in now.items() if notes.get(name) != stamp}
    wrong = changed(folder, unknown)
    if len(unknown) > len(wrong):
        _write_notes(folder, {name: stamp for name, stamp in now.items() if name not in wrong})
    return [name for name in wrong if elsewhere.get(folder / name) != files[name]["bytes"]]


def changed(folder: Path, files: Files) -> list[str]:
    """The names of files that have their recorded size and another content: each is read."""
    return [name for name, entry in _of_right_size(folder, files).items() if digest_of(folder / name) != entry]


def _of_right_size(folder: Path, files: Files) -> Files:
    return {name: entry for name, entry in files.items() if _size(folder / name) == entry["bytes"]}


def verify(folder: Path, files: Files) -> None:
    """Read every file. Raise ArtifactError for one that leads out of the folder, is missing, or is another."""
    check_inside(folder, files)
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{path} is missing")
        if digest_of(path) != {"sha256": entry["sha256"], "bytes": entry["bytes"]}:
            raise ArtifactError(f"{path} is damaged or was changed: it is not the file whose sha256 was recorded")


def _size(path: Path) -> int | None:
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _stamp(path: Path) -> list[int]:
    """The time of the last change of an inode, unlike that of its content, cannot be set by who copies files."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _notes_of(folder: Path) -> Path:
    """In the store of a node's folder, `{store}/{pipeline}/{stage}/{fingerprint}/`."""
    pipeline, stage, fingerprint = folder.absolute().parts[-3:]
    return folder.absolute().parents[2] / ".verified" / f"{pipeline}.{stage}.{fingerprint}.json"


def _read_notes(folder: Path) -> dict[str, Any]:
    try:
        notes: dict[str, Any] = json.loads(_notes_of(folder).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # there is none yet, or it was cut short: everything is read
        return {}
    return notes if isinstance(notes, dict) else {}


def _write_notes(folder: Path, notes: Mapping[str, Any]) -> None:
    path = _notes_of(folder)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with suppress(OSError):  # a store may be read by who cannot write to it, and then is read again
        path.parent.mkdir(exist_ok=True)
        aside.write_text(json.dumps(notes), encoding="utf-8")
        aside.rename(path)
