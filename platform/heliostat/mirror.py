"""The lasting end of a store whose `storage` is `s3://bucket/prefix`: what a machine may lose and a run may not.

Stages work in the store's folder on this machine, as ever; each file of a node's folder has its place below the URL.
What a stage leaves while it runs, its checkpoints or the journal of a search, is sent every few seconds; the files of a
finished node are sent before its record, so a record in the bucket says what one in a folder says. An object appears
when all of it has arrived. Another machine reads the records when it plans, fetches the files of what it reuses, and
goes on with what an interrupted stage had sent.

The bucket is one for all who use it, but a pipeline should run once at a time: the lock of a store is of one machine.
"""

import logging
import os
import shutil
import threading
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from heliostat.core.artifact import (
    RECORD,
    Record,
    digest_files,
    find_artifact,
    parse_record,
    read_record,
    write_record,
)
from heliostat.core.spec import Pipeline
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


class Mirror(Protocol):
    """What a run asks of its mirror. Each method raises ArtifactError when the other end cannot do it."""

    def look(self, pipeline: str) -> Mapping[Path, int]:
        """The size of every file that is there, by its place in the folder. The records are here afterwards.

        Raises SpecError when nobody answers.
        """

    def fetch(self, folder: Path) -> None:
        """Bring what a node's folder lacks; of a file that grows, such as a journal, the longer one is the later.

        Raises ArtifactError too where a file is not the one that the record tells of.
        """

    def send(self, *paths: Path) -> None:
        """Send these files, and of these folders all that has changed."""

    @contextmanager
    def following(self, folder: Path, *, anew: bool) -> Iterator[None]:
        """Go on with what the other end has of a node's folder (`anew`: forget it), and send what the block leaves.

        What cannot be sent by its end waits for `send`.
        """


def mirror_of(pipeline: Pipeline) -> Mirror:
    """The mirror of the pipeline's store. Raises SpecError when there is no such bucket."""
    if pipeline.bucket_url is None:
        return NoMirror()
    return BucketMirror(pipeline.bucket_url, pipeline.storage_folder)


def try_bucket(url: str) -> None:
    """Write a small object below the URL, list, read and delete it.

    Raises SpecError when there is no such bucket or nobody answers, ArtifactError that says what else cannot be done.
    """
    BucketMirror(url, Path()).try_out()


class NoMirror:
    """The store is a folder, and that is all."""

    def look(self, pipeline: str) -> Mapping[Path, int]:
        return {}

    def fetch(self, folder: Path) -> None: ...

    def send(self, *paths: Path) -> None: ...

    @contextmanager
    def following(self, folder: Path, *, anew: bool) -> Iterator[None]:
        yield


class BucketMirror:
    """A bucket, through Arrow's S3 client: credentials, region and endpoint are where AWS's own tools look for them."""

    def __init__(self, url: str, folder: Path) -> None:
        self._url, self._folder = url.rstrip("/"), folder
        self._sent: dict[Path, Stamp] = {}
        """The local files that the bucket has as they are."""
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
        found = self._listed(self._folder / pipeline, SpecError)
        with ThreadPoolExecutor(LOOKS_AT_ONCE) as pool:
            list(pool.map(self._take_record, [path for path, _ in found if path.name == RECORD]))
        for path, there in found:
            if path.is_file() and path.stat().st_size == there.size:
                self._sent[path] = _stamp(path)
        return {path: there.size for path, there in found}

    def fetch(self, folder: Path) -> None:
        with self._fetching:  # two nodes may need the same one
            if find_artifact(folder) is not None:
                return
            record = read_record(folder)
            for path, there in self._listed(folder):
                name = path.relative_to(folder).as_posix()
                if record and name in record.files:
                    if _size(path) != there.size == record.files[name]["bytes"]:
                        self._fetch_file(path)
                        self._check(folder, name, record)
                elif path.name != RECORD and _size(path) < there.size:
                    self._fetch_file(path)

    def send(self, *paths: Path) -> None:
        for path in paths:
            if path.is_dir():
                self._send_folder(path)
            else:
                self._send_file(path)

    @contextmanager
    def following(self, folder: Path, *, anew: bool) -> Iterator[None]:
        if anew:
            with self._reached():
                self._bucket.delete_dir_contents(self._key(folder), missing_dir_ok=True)
        else:
            self.fetch(folder)
        over = threading.Event()
        thread = threading.Thread(target=self._send_until, args=(folder, over), name="heliostat-mirror", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self._try_to_send(folder)

    # --- one way and the other --------------------------------------------------------------------

    def _send_until(self, folder: Path, over: threading.Event) -> None:
        while not over.wait(SEND_EVERY_S):
            self._try_to_send(folder)

    def _try_to_send(self, folder: Path) -> None:
        """What cannot be sent now is sent with what comes after it."""
        try:
            self._send_folder(folder)
        except ArtifactError as error:
            log.warning("%s; what is new in %s is sent later", error, folder)

    def _send_folder(self, folder: Path) -> None:
        present = dict(_lasting_files(folder))
        changed = [path for path, stamp in present.items() if self._sent.get(path) != stamp]
        for path in sorted(changed, key=lambda path: path.name == RECORD):
            self._send_file(path)
        if changed:
            record = read_record(folder)
            kept = {folder / name for name in record.files} if record else set()
            for path, _ in self._listed(folder):
                if path not in present and path not in kept:
                    with self._reached():
                        self._bucket.delete_file(self._key(path))

    def _send_file(self, path: Path) -> None:
        try:
            source = path.open("rb")
        except FileNotFoundError:  # a checkpoint that newer ones have replaced meanwhile
            return
        with source, self._reached():
            stamp = _stamp(path)
            with self._bucket.open_output_stream(self._key(path)) as sink:
                shutil.copyfileobj(source, sink, CHUNK_BYTES)
        self._sent[path] = stamp

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

    def _check(self, folder: Path, name: str, record: Record) -> None:
        """Whether a fetched file is the one whose digest is in the record."""
        if digest_files(folder, [name])[name] != record.files[name]:
            (folder / name).unlink()
            raise ArtifactError(
                f"{self._at(folder / name)} is not the file that the record of {record.node} tells of; "
                f"make it again: --force {record.stage}"
            )

    def _fetch_file(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.fetched")
        with self._reached(), self._bucket.open_input_stream(self._key(path)) as source, aside.open("wb") as sink:
            shutil.copyfileobj(source, sink, CHUNK_BYTES)
        aside.rename(path)
        self._sent[path] = _stamp(path)

    def _listed(self, folder: Path, error: type[HeliostatError] = ArtifactError) -> list[tuple[Path, "FileInfo"]]:
        """All files below, each with the place that it has in the folder."""
        from pyarrow.fs import FileType

        with self._reached(error):
            found = self._bucket.get_file_info(self._below(folder))
        return [
            (self._folder / file.path.removeprefix(f"{self._prefix}/"), file)
            for file in found
            if file.type == FileType.File
        ]

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


def _lasting_files(folder: Path) -> Iterator[tuple[Path, Stamp]]:
    """The files that another machine could go on with: neither hidden nor half written."""
    for parent, folders, files in os.walk(folder):
        folders[:] = filter(_lasts, folders)
        for path in (Path(parent, name) for name in filter(_lasts, files)):
            with suppress(FileNotFoundError):  # it may be deleted while this looks
                yield path, _stamp(path)


def _lasts(name: str) -> bool:
    return not name.startswith(".") and not name.endswith(".tmp")


def _size(path: Path) -> int:
    """That of a local file; -1 where there is none."""
    return path.stat().st_size if path.is_file() else -1


def _stamp(path: Path) -> Stamp:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
