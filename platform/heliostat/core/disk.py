"""Writes that find no room: what the libraries' many words for it come to, and which disk it is.

Python raises OSError with a number, torch `enforce fail at inline_container.cc`, SQLite `database or disk is full`, and
code of others puts any of them into a text. All become a DiskError that names the folder and the room that is left.
"""

import errno
import os
import re
import resource
import sqlite3
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from heliostat.core.commands import run_again
from heliostat.errors import DiskError, HeliostatError

_TORCH = re.compile(r"inline_container\.cc|PytorchStreamWriter failed|basic_ios::clear: iostream error")
_BY_TEXT = {
    re.compile(r"\[Errno 28\]|No space left on device|database or disk is full"): errno.ENOSPC,
    re.compile(r"\[Errno 122\]|Disk quota exceeded"): errno.EDQUOT,
    re.compile(r"\[Errno 30\]|Read-only file system|attempt to write a readonly database"): errno.EROFS,
    re.compile(r"\[Errno 27\]"): errno.EFBIG,
}
_PROBE_BYTES = 2**20
MB = 1e6


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn an error that comes of a disk without room into a DiskError; `folder` is where most of it is written."""
    try:
        yield
    except Exception as error:
        if (found := disk_error(error, folder)) is not None:
            raise found from error
        raise


def disk_error(error: BaseException, folder: Path) -> DiskError | None:
    """The DiskError that an error comes to; None for one of another kind."""
    if isinstance(error, DiskError):
        return error
    why = why_not_written(error, folder)
    return DiskError(why) if why else None


def with_advice(error: DiskError) -> str:
    """What a DiskError says, and what to do about it; for the process in which the command was typed."""
    return f"{error} and run again: {run_again()}"


def why_failed(error: Exception, folder: Path) -> str:
    """What to tell of an error where the command was typed; of one that is not ours, its traceback too."""
    if (full := disk_error(error, folder)) is not None:
        return with_advice(full)
    if isinstance(error, HeliostatError):
        return str(error)
    return f"{type(error).__name__}: {error}\n{''.join(traceback.format_tb(error.__traceback__))}".rstrip()


def why_not_written(error: BaseException, folder: Path) -> str | None:
    """`the disk of FOLDER is full (3.2 MB free); free some` and the like, if that is what an error comes of."""
    for one in _chain(error):
        number = _errno(one)
        if number is None and _TORCH.search(str(one)) and isinstance(one, RuntimeError):
            number = _probed(folder)
        if number is not None and (said := _told(number, _named(one) or [folder, _scratch()])):
            return said
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it was raised from or while handling."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or one.__context__


def _errno(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorname", "").startswith("SQLITE_IOERR_WRITE"):
        return errno.EFBIG if _limit() else errno.ENOSPC
    return next((number for pattern, number in _BY_TEXT.items() if pattern.search(str(error))), None)


def _probed(folder: Path) -> int | None:
    """What a small write into `folder` fails by; torch does not say why it could not write."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * _PROBE_BYTES)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno
    return errno.EFBIG if _limit() else None


def _named(error: BaseException) -> list[Path]:
    """The folders of the files that an error names: of a copy both, where it came from and where it goes."""
    names = [error.filename, error.filename2] if isinstance(error, OSError) else []
    return [Path(os.fsdecode(name)).absolute().parent for name in names if isinstance(name, str | bytes)]


def _scratch() -> Path:
    return Path(tempfile.gettempdir())


def _told(number: int, folders: Sequence[Path]) -> str | None:
    """Of several folders that may be meant, it is about the one on whose disk there is least room."""
    where = min(folders, key=_free_bytes)
    match number:
        case errno.ENOSPC if _free_bytes(where) > _PROBE_BYTES and _has_no_inodes(where):
            return f"the disk of {where} can take no more files: it has no inodes left; delete some"
        case errno.ENOSPC:
            return f"the disk of {where} is full ({_free_bytes(where) / MB:.1f} MB free); free some"
        case errno.EDQUOT:
            return f"the quota of the disk of {where} is used up; free some"
        case errno.EROFS:
            return f"the disk of {where} is read-only; make it writable"
        case errno.EFBIG if (limit := _limit()) is not None:
            return f"a file in {where} is larger than ulimit -f allows ({limit / MB:.1f} MB); raise that limit"
        case errno.EFBIG:
            return f"a file in {where} is larger than its disk takes; name another storage"
    return None


def _free_bytes(folder: Path) -> int:
    disk = os.statvfs(_existing(folder))
    return disk.f_bavail * disk.f_frsize


def _has_no_inodes(folder: Path) -> bool:
    disk = os.statvfs(_existing(folder))
    return disk.f_files > 0 and disk.f_favail == 0


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _limit() -> int | None:
    """How many bytes a file of this process may have, if there is a limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return None if soft == resource.RLIM_INFINITY else soft
