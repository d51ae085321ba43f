"""Checkpoints of one training run in one folder: the newest few, and the best epoch known to each of them.

One is called `epoch-00007.best.0f3a…`: `best` marks an epoch that was the best so far, the rest is the start of the
content's sha256. It is a file (`.pt`), or a folder where the model is spread over workers. It is written aside, synced
and renamed, so a crash leaves no half of one under that name; one that was damaged later is noticed by its digest, and
the one before is used. Files are unpickled as tensors and plain values only, but for torch's `.metadata` of a folder:
checkpoints are trusted, as all of a store is.

A file is written by a thread while training goes on from the state that was copied for it. A folder is not: its parts
lie with all workers, and none may change its own before every other has written. Torch's `.metadata` in it tells that
all parts are there; a folder of this machine without it has only those of the workers here.
"""

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from heliostat.core.artifact import COMPLETES
from heliostat.core.carrier import HERE, Carrier
from heliostat.core.spec import Resources
from heliostat.core.state import map_tensors

log = logging.getLogger(__name__)

State = dict[str, Any]
_NAME = re.compile(r"epoch-(?P<epoch>\d+)\.(?P<best>best\.)?(?P<digest>[0-9a-f]{32})(?P<kind>\.pt)?")


class _File(NamedTuple):
    epoch: int
    is_best: bool
    digest: str
    path: Path


class _Writer:
    """A thread with one thing to write at a time."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Begin. What was begun before must be finished."""
        self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing = self._pool.submit(write)

    def finish(self) -> None:
        """Wait for what was begun. Raises what went wrong with it."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


@dataclass(frozen=True)
class Checkpoints:
    """Reads and writes a folder. One process of those who see it writes: rank 0, of all. The newest `keep` stay."""

    folder: Path
    keep: int = Resources().keep_checkpoints
    warn: Callable[[str], None] = log.warning
    """Is told of each checkpoint that is damaged, once."""
    carrier: Carrier = HERE
    """Brings to other machines, and from there, what several workers write and read together."""
    _damaged: set[Path] = field(default_factory=set, repr=False, compare=False)
    _writer: _Writer = field(default_factory=_Writer, repr=False, compare=False)

    def save(self, state: State, *, epoch: int, is_best: bool) -> None:
        """Copy the state (tensors and plain values) after `epoch`, and write it while the caller goes on.

        Raises what went wrong with the one before.
        """
        self._writer.finish()  # or two copies would lie in memory
        copied = map_tensors(state, lambda tensor: tensor.detach().to("cpu", copy=True))
        self._writer.start(partial(self._write, copied, epoch=epoch, is_best=is_best))

    def flush(self) -> None:
        """Wait until all that was saved is on the disk. Raises OSError when it did not get there."""
        self._writer.finish()

    def _write(self, state: State, *, epoch: int, is_best: bool) -> None:
        """Write a checkpoint, then delete what is no longer needed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self.folder / f"epoch-{epoch:05d}.pt.tmp"
        torch.save(state, aside)
        _sync(aside)
        name = _name(epoch, is_best, _digest(aside)) + ".pt"
        aside.rename(self.folder / name)
        _sync(self.folder)
        self.prune(newest=name)

    def keep_folder(self, aside: Path, name: str) -> Path:
        """Give a folder its name, by `folder_name`: it has all that will be written on this machine."""
        for path in aside.iterdir():
            _sync(path)
        target = self.folder / name
        if target.exists():  # the same epoch once more, to the same bytes
            shutil.rmtree(target)
        aside.rename(target)
        _sync(self.folder)
        return target

    def latest(self) -> State | None:
        """The newest checkpoint that is intact."""
        self.flush()
        return next((_load(file) for file in self._intact(self._files())), None)

    def best(self) -> State | None:
        """The newest intact checkpoint that was the best when it was written."""
        self.flush()
        return next((_load(file) for file in self._intact(file for file in self._files() if file.is_best)), None)

    def is_empty(self) -> bool:
        """Whether nothing has been written yet, or not to its end."""
        return not self._files()

    def newest_folders(self) -> tuple[Path, Path] | None:
        """The newest intact folder to go on from, and that of its best epoch."""
        for newest in self._intact(self._files()):
            for best in self._intact(file for file in self._files() if file.is_best and file.epoch <= newest.epoch):
                return newest.path, best.path
        return None

    def are_spread(self) -> bool | None:
        """Whether the newest is of a model that was spread over workers; None where there is none."""
        return next((file.path.suffix != ".pt" for file in self._files()), None)

    def _named(self) -> list[_File]:
        """Newest first."""
        matches = ((_NAME.fullmatch(path.name), path) for path in self.folder.glob("epoch-*"))
        files = [_File(int(m["epoch"]), m["best"] is not None, m["digest"], path) for m, path in matches if m]
        return sorted(files, reverse=True)

    def _files(self) -> list[_File]:
        """Those that are whole, newest first."""
        return [file for file in self._named() if file.path.suffix == ".pt" or _has_all_parts(file.path)]

    def _intact(self, files: Iterable[_File]) -> Iterator[_File]:
        for file in files:
            if _digest(file.path).startswith(file.digest):
                yield file
            elif file.path not in self._damaged:
                self._damaged.add(file.path)
                self.warn(f"checkpoint {file.path} is damaged: its content does not match its name; it is passed over")

    def prune(self, *, newest: str) -> None:
        """Keep the newest, and for each the best of its time, so that any of them is enough to go on from."""
        epoch = next(file.epoch for file in self._named() if file.path.name == newest)
        past = [file for file in self._named() if file.epoch < epoch or file.path.name == newest]
        kept = {file.path for file in past[: self.keep]}
        for recent in past[: self.keep]:
            kept.update([file.path for file in past if file.is_best and file.epoch <= recent.epoch][:1])
        for path in self.folder.glob("epoch-*"):
            if path not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _name(epoch: int, is_best: bool, digest: str) -> str:
    return f"epoch-{epoch:05d}.{'best.' if is_best else ''}{digest[:32]}"


def folder_name(digests: Mapping[str, str], *, epoch: int, is_best: bool) -> str:
    """That of a checkpoint whose parts, all of them, have these names and digests."""
    return _name(epoch, is_best, _digest_of_all(digests))


def digest_parts(paths: Iterable[Path]) -> dict[str, str]:
    """The sha256 of each file, by its name."""
    return {path.name: _digest(path) for path in paths}


def _has_all_parts(folder: Path) -> bool:
    return any((folder / name).exists() for name in COMPLETES)


def _digest_of_all(digests: Mapping[str, str]) -> str:
    lines = [f"{name} {digest}" for name, digest in sorted(digests.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _digest(path: Path) -> str:
    """The sha256 of a file, or of the names and digests of all files in a folder."""
    if path.is_dir():
        return _digest_of_all(digest_parts(path.iterdir()))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Write a file, or a folder's names, through to the disk: a rename survives a power cut only with this."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _load(file: _File) -> State:
    state: State = torch.load(file.path, map_location="cpu", weights_only=True)
    return state
