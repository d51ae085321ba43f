"""Events on disk until they are delivered: one journal per tracker, in one folder.

A journal is `NAME.jsonl`, a header line (where the events go) and then one line per event, and `NAME.offset`, how many
bytes of it have been delivered. It is locked for as long as its process lives, so that what a dead process left behind
is told from what a living one still writes, and it is deleted when all of it has been delivered.
"""

import errno
import fcntl
import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from heliostat.tracking.events import Event, from_json, to_json
from heliostat.tracking.writer import Target


class Journal:
    """An open, locked journal. Its methods raise OSError when the disk does not take what they write."""

    def __init__(self, path: Path, file: BinaryIO, target: Target, header_bytes: int) -> None:
        self.target = target
        self._path = path
        self._offset_path = path.with_suffix(".offset")
        self._file = file
        self._end = self._delivered = header_bytes

    @classmethod
    def create(cls, folder: Path, target: Target) -> "Journal":
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{time.time_ns():020d}-{uuid.uuid4().hex[:6]}.jsonl"
        file = path.open("xb", buffering=0)
        fcntl.flock(file, fcntl.LOCK_EX)
        journal = cls(path, file, target, 0)
        journal._write(json.dumps(asdict(target)))
        journal._delivered = journal._end
        return journal

    def append(self, event: Event) -> "Spooled":
        self._write(to_json(event))
        return Spooled(event, self, self._end)

    def _write(self, text: str) -> None:
        line = text.encode() + b"\n"
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        self._end += len(line)

    def undelivered(self) -> list["Spooled"]:
        """What an earlier process wrote and did not deliver. A last line that was cut off is left out."""
        # The offset is empty if that process died between opening its file and writing it: then all is delivered again.
        if self._offset_path.exists() and (offset := self._offset_path.read_text(encoding="ascii")):
            self._end = self._delivered = int(offset)
        self._file.seek(self._delivered)
        spooled = []
        for line in self._file.read().splitlines(keepends=True):
            if line.endswith(b"\n"):
                self._end += len(line)
                spooled.append(Spooled(from_json(line.decode()), self, self._end))
        return spooled

    def mark(self, offset: int) -> None:
        """Note that everything before `offset` is delivered."""
        self._delivered = offset
        self._offset_path.write_text(str(offset), encoding="ascii")

    def release(self) -> None:
        """Unlock the journal, and delete it if all of it is delivered."""
        if self._delivered == self._end:
            self._path.unlink()
            self._offset_path.unlink(missing_ok=True)
        self._file.close()


@dataclass(frozen=True)
class Spooled:
    """An event to be delivered, its journal (none when the disk would not take it) and the offset after it."""

    event: Event
    journal: Journal | None = None
    offset: int = 0


def mark_delivered(spooled: Iterable[Spooled]) -> None:
    for journal, offset in {one.journal: one.offset for one in spooled}.items():
        if journal:
            journal.mark(offset)


def left_behind(folder: Path) -> Iterator[Journal]:
    """The journals of processes that are gone, oldest first, each locked. The caller releases them."""
    for path in sorted(folder.glob("*.jsonl")):
        try:
            file = path.open("r+b", buffering=0)
        except FileNotFoundError:  # another process has just delivered it
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            continue
        header = file.readline()
        if path.exists() and header.endswith(b"\n"):
            yield Journal(path, file, Target(**json.loads(header)), len(header))
        else:
            file.close()
