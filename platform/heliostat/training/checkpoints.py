"""Checkpoints of one training run in one folder: the newest two, and the best epoch known to each of them.

A file is `epoch-00007.best.0f3a….pt`: `best` marks an epoch that was the best so far, the rest is the start of the
content's sha256. It is written aside, synced and renamed, so a crash leaves no half file under that name; one that was
damaged later is noticed by its digest, and the one before is used. Nothing is unpickled but tensors and plain values.
"""

import hashlib
import io
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

log = logging.getLogger(__name__)

State = dict[str, Any]
_NAME = re.compile(r"epoch-(?P<epoch>\d+)\.(?P<best>best\.)?(?P<digest>[0-9a-f]{32})\.pt")
_KEEP_NEWEST = 2


class _File(NamedTuple):
    epoch: int
    is_best: bool
    digest: str
    path: Path


@dataclass(frozen=True)
class Checkpoints:
    """Reads and writes a folder. One process writes: rank 0."""

    folder: Path

    def save(self, state: State, *, epoch: int, is_best: bool) -> None:
        """Write the state (tensors and plain values) after `epoch`, then delete what is no longer needed."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getbuffer()
        digest = hashlib.sha256(content).hexdigest()[:32]
        name = f"epoch-{epoch:05d}.{'best.' if is_best else ''}{digest}.pt"
        self.folder.mkdir(parents=True, exist_ok=True)
        _write_atomically(self.folder / name, content)
        self._prune(newest=name)

    def latest(self) -> State | None:
        """The newest checkpoint that is intact."""
        return _first_intact(self._files())

    def best(self) -> State | None:
        """The newest intact checkpoint that was the best when it was written."""
        return _first_intact(file for file in self._files() if file.is_best)

    def _files(self) -> list[_File]:
        """Newest first."""
        matches = ((_NAME.fullmatch(path.name), path) for path in self.folder.glob("epoch-*.pt"))
        files = [_File(int(m["epoch"]), m["best"] is not None, m["digest"], path) for m, path in matches if m]
        return sorted(files, reverse=True)

    def _prune(self, *, newest: str) -> None:
        """Keep the newest two, and for each the best of its time, so that either is enough to go on from."""
        epoch = next(file.epoch for file in self._files() if file.path.name == newest)
        past = [file for file in self._files() if file.epoch < epoch or file.path.name == newest]
        kept = {file.path for file in past[:_KEEP_NEWEST]}
        for recent in past[:_KEEP_NEWEST]:
            kept.update([file.path for file in past if file.is_best and file.epoch <= recent.epoch][:1])
        for path in self.folder.glob("epoch-*"):
            if path not in kept:
                path.unlink()


def _write_atomically(path: Path, content: memoryview) -> None:
    aside = path.with_name(path.name + ".tmp")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself survives a power cut only with this
    finally:
        os.close(folder)


def _first_intact(files: Iterable[_File]) -> State | None:
    for file in files:
        content = file.path.read_bytes()
        if hashlib.sha256(content).hexdigest().startswith(file.digest):
            state: State = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            return state
        log.warning(
            "checkpoint %s is damaged (its content does not match its name); using the one before it", file.path
        )
    return None
