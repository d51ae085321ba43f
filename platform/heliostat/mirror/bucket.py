"""The two ends of a store in a bucket: files of a folder here, objects below a URL there."""

import logging
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from heliostat.core.artifact import (
    COMPLETES,
    RECORD,
    find_artifact,
    parse_record,
    read_record,
    write_record,
)
from heliostat.core.carrier import Files
from heliostat.core.commands import run_again
from heliostat.core.integrity import check_files, check_names, damaged, digest_of, lacking
from heliostat.errors import ArtifactError, HeliostatError, SpecError

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSelector

SEND_EVERY_S = 2.0
"""How long what a running stage left may wait until it is sent."""
CHUNK_BYTES = 2**20
LOOKS_AT_ONCE = 8

log = logging.getLogger(__name__)

Stamp = tuple[int, int]
"""Size and time of change of a local file."""


class Bucket:
    """A bucket, through Arrow's S3 client: credentials, region and endpoint are where AWS's own tools look for them.

    `folder` is the store's on this machine. The methods of a Mirror raise as said there.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self._url, self._folder = url.rstrip("/"), folder
        self.sent: dict[Path, Stamp] = {}
        """The local files that the bucket has as they are, as far as is known."""
        self._fetching = threading.Lock()
        with self._reached(SpecError):
            from pyarrow.fs import FileSystem

            self._bucket, self._prefix = FileSystem.from_uri(self._url)

    def try_out(self) -> None:
        """See `try_bucket`."""
        folder, content = Path(f".tried-{uuid.uuid4().hex}"), b"heliostat"
        key = self._key(folder / "object")
        with self._reached(doing="cannot be written"), self._bucket.open_output_stream(key) as sink:
            sink.write(content)
        with self._reached(doing="cannot be listed"):
            found = [there.path for there in self._bucket.get_file_info(self._below(folder))]
        with self._reached(doing="cannot be read"), self._bucket.open_input_stream(key) as source:
            is_same = source.read() == content
        with self._reached(doing="what is there cannot be deleted"):
            self._bucket.delete_dir(self._key(folder))
        if not is_same or key not in found:
            raise ArtifactError(f"storage: {self._url}: what was written is not what is there")

    def look(self, pipeline: str) -> Mapping[Path, int]:
        """See Mirror."""
        found = self._listed(self._folder / pipeline, SpecError)
        with ThreadPoolExecutor(LOOKS_AT_ONCE) as pool:
            list(pool.map(self._take_record, [path for path, _ in found if path.name == RECORD]))
        for path, there in found:
            if path.is_file() and path.stat().st_size == there.size:
                self.sent[path] = _stamp(path)
        return {path: there.size for path, there in found}

    def fetch(self, folder: Path) -> None:
        """See Mirror."""
        with self._fetching:  # two nodes may need the same one
            if find_artifact(folder) is not None:
                return
            record = read_record(folder)
            wrong = {*lacking(folder, record.files), *damaged(folder, record.files)} if record else set()
            for path, there in sorted(self._listed(folder), key=_completes_last):
                name = path.relative_to(folder).as_posix()
                if record and name in record.files:
                    if name in wrong and there.size == record.files[name]["bytes"]:
                        self._fetch_file(path)
                        self._check(path, record.files[name])
                elif path.name != RECORD and _size(path) < there.size:
                    self._fetch_file(path)

    def fetch_files(self, paths: Set[Path]) -> None:
        """Bring those that are there, whatever is here under their names."""
        with self._fetching:
            there = {path for folder in {path.parent for path in paths} for path, _ in self._listed(folder)}
            for path in there & paths:
                self._fetch_file(path)

    def take(self, folder: Path, files: Files) -> None:
        """Have these files here. Raises ArtifactError where one is missing, or is another than its digest tells."""
        with self._fetching:
            check_files(files, place=self._at(folder))
            for name in (*lacking(folder, files), *damaged(folder, files)):
                self._fetch_file(folder / name)
                self._check(folder / name, files[name])

    def send(self, *paths: Path) -> None:
        """See Mirror. What was there, and is here no more, goes there too."""
        for path in paths:
            if path.is_dir():
                self._send_folder(path)
            else:
                self._send_file(path)

    def forget(self, folder: Path) -> None:
        """Delete all that is there of a folder."""
        with self._reached():
            self._bucket.delete_dir_contents(self._key(folder), missing_dir_ok=True)

    # --- one way and the other --------------------------------------------------------------------

    def _send_folder(self, folder: Path) -> None:
        known = {path for path in tuple(self.sent) if path.is_relative_to(folder)}  # first: others may fetch meanwhile
        present = dict(lasting_files(folder))
        changed = [(path, stamp) for path, stamp in present.items() if self.sent.get(path) != stamp]
        for path, _ in sorted(changed, key=_oldest_first):  # a checkpoint is of no use without the best one before it
            self._send_file(path)
        gone = known - present.keys()
        if not (changed or gone):
            return
        record = read_record(folder)
        kept = {folder / name for name in (RECORD, *record.files)} if record else set()
        for path, _ in sorted(self._listed(folder), key=_completes_last, reverse=True):
            if path not in present and (path not in kept if record else path in gone):
                with self._reached(), suppress(FileNotFoundError):  # another machine may tidy up too
                    self._bucket.delete_file(self._key(path))
        for path in gone:
            self.sent.pop(path, None)

    def _send_file(self, path: Path) -> None:
        try:
            source = path.open("rb")
        except FileNotFoundError:  # a checkpoint that newer ones have replaced meanwhile
            return
        with source, self._reached():
            stamp = _stamp(path)
            with self._bucket.open_output_stream(self._key(path)) as sink:
                shutil.copyfileobj(source, sink, CHUNK_BYTES)
        self.sent[path] = stamp

    def _take_record(self, path: Path) -> None:
        """Let the record there count here, unless this one is of the same artifact and says more of it.

        A file that is here, but not of the artifact that is told of there, goes.
        """
        with self._reached(SpecError), self._bucket.open_input_stream(self._key(path)) as source:
            text = source.read().decode()
        there, here = parse_record(text, place=self._at(path)), read_record(path.parent)
        if here is not None and here.files == there.files and _size(path) >= len(text.encode()):
            return
        for name, entry in there.files.items():
            if here is None or here.files.get(name) != entry:
                (path.parent / name).unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_record(path.parent, there)

    def _check(self, path: Path, entry: Mapping[str, object]) -> None:
        """Whether a fetched file is the one whose digest is in its record."""
        if digest_of(path) != entry:
            path.unlink()
            stage = path.relative_to(self._folder).parts[1]
            again = run_again("--force", stage)
            raise ArtifactError(f"{self._at(path)} is not the file that its record tells of; make it again: {again}")

    def _fetch_file(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.fetched")
        with self._reached(), self._bucket.open_input_stream(self._key(path)) as source, aside.open("wb") as sink:
            shutil.copyfileobj(source, sink, CHUNK_BYTES)
        aside.rename(path)
        self.sent[path] = _stamp(path)

    def _listed(self, folder: Path, error: type[HeliostatError] = ArtifactError) -> list[tuple[Path, "FileInfo"]]:
        """All files below, each with the place that it has in the folder."""
        from pyarrow.fs import FileType

        with self._reached(error):
            found = self._bucket.get_file_info(self._below(folder))
        keys = {file.path.removeprefix(f"{self._prefix}/"): file for file in found if file.type == FileType.File}
        check_names(keys, place=self._url)
        return [(self._folder / key, file) for key, file in keys.items()]

    def _below(self, folder: Path) -> "FileSelector":
        from pyarrow.fs import FileSelector

        return FileSelector(self._key(folder), recursive=True, allow_not_found=True)

    def _key(self, path: Path) -> str:
        return f"{self._prefix}/{path.relative_to(self._folder).as_posix()}"

    def _at(self, path: Path) -> str:
        return f"{self._url}/{path.relative_to(self._folder).as_posix()}"

    @contextmanager
    def _reached(self, error: type[HeliostatError] = ArtifactError, *, doing: str = "") -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as found:  # Arrow's client raises either
            what = f"{doing}: " if doing else ""
            raise error(f"storage: {self._url}: {what}{str(found).partition(' (Request ID')[0]}") from found


@contextmanager
def sending(send: Callable[[], None], folder: Path) -> Iterator[Callable[[], None]]:
    """Call `send` every few seconds while the block runs, when it ends, and when the block calls what it is given.

    What cannot be sent now is sent with what comes after it.
    """

    def try_to_send() -> None:
        try:
            send()
        except ArtifactError as error:
            log.warning("%s; what is new in %s is sent later", error, folder)

    def until_over() -> None:
        while not over.wait(SEND_EVERY_S):
            try_to_send()

    over = threading.Event()
    thread = threading.Thread(target=until_over, name="heliostat-mirror", daemon=True)
    thread.start()
    try:
        yield try_to_send
    finally:
        over.set()
        thread.join()
        try_to_send()


def lasting_files(folder: Path) -> Iterator[tuple[Path, Stamp]]:
    """The files that another machine could go on with: neither hidden nor half written."""
    for parent, folders, files in os.walk(folder):
        folders[:] = filter(_lasts, folders)
        for path in (Path(parent, name) for name in filter(_lasts, files)):
            with suppress(FileNotFoundError):  # it may be deleted while this looks
                yield path, _stamp(path)


def _oldest_first(changed: tuple[Path, Stamp]) -> tuple[bool, int]:
    """But what completes others comes last."""
    return _completes_last(changed), changed[1][1]


def _completes_last(found: tuple[Path, object]) -> bool:
    return found[0].name in COMPLETES


def _lasts(name: str) -> bool:
    return name in COMPLETES or (not name.startswith(".") and not name.endswith(".tmp"))


def _size(path: Path) -> int:
    """That of a local file; -1 where there is none."""
    return path.stat().st_size if path.is_file() else -1


def _stamp(path: Path) -> Stamp:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
