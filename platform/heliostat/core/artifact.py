"""Artifacts and their records on disk.

A node's folder is `{storage}/{pipeline}/{stage}/{fingerprint}/`. `record.json` in it is written last, to a temporary
name and renamed: a record present means done and reusable, a record absent means not done, whatever else is there.
The speed of a model is measured later than the rest, and then put into its record.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from heliostat.core.integrity import check_files, damaged, digest_of, lacking
from heliostat.errors import ArtifactError

RECORD = "record.json"
FORMAT: Final = 1
"""Of records: raised when an older Heliostat would misread a new one. Records without it are of format 1."""
COMPLETES = frozenset({RECORD, ".metadata"})
"""Files that tell that all others in their folder are there: of an artifact, and of a checkpoint whose parts several
workers wrote (torch's name). They are written last, sent last and deleted first."""


@dataclass(frozen=True)
class Record:
    """What is known of a finished node. All fields are JSON values."""

    kind: str
    """The artifact's kind: `model`, `params`, or what an own stage declares."""
    pipeline: str
    node: str
    stage: str
    uses: str
    fingerprint: str
    identity: Mapping[str, Any]
    """The document whose hash is the fingerprint: what `explain_change` compares."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, list[dict[str, str]]] = field(default_factory=dict)
    """For each slot, the artifacts that went in: `[{"node", "fingerprint"}]`."""
    files: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """`{relative name: {"sha256", "bytes"}}`."""
    tracking: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    git_commit: str | None = None
    started_at: str = ""
    seconds: float = 0.0
    format: int = FORMAT


@dataclass(frozen=True)
class Artifact:
    """A finished node: its folder and its record."""

    folder: Path
    record: Record

    @property
    def node(self) -> str:
        return self.record.node

    @property
    def metrics(self) -> Mapping[str, float]:
        return self.record.metrics

    @property
    def speed(self) -> Mapping[str, Any] | None:
        """What the record says of how the model's speed was measured; None until it has been."""
        found: Mapping[str, Any] | None = self.record.details.get("speed")
        return found


def write_record(folder: Path, record: Record) -> None:
    """Write `record.json`, last and atomically: after this returns, the node is done even if the power goes."""
    write_json(folder / RECORD, asdict(record))


def artifact_json(record: Record) -> str:
    """The record as the text of `record.json`."""
    return json.dumps(asdict(record), indent=1, ensure_ascii=False) + "\n"


def write_json(path: Path, document: Any) -> None:
    """Write a JSON document under a temporary name, flush it to disk, and rename it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(document, file, indent=1, ensure_ascii=False, allow_nan=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def read_record(folder: Path) -> Record | None:
    """The record of a node's folder, or None when the node is not done. Raises ArtifactError for a damaged record."""
    path = folder / RECORD
    try:
        return parse_record(path.read_text(encoding="utf-8"), place=str(path))
    except FileNotFoundError:
        return None


def parse_record(text: str, *, place: str) -> Record:
    """The record that the text of a `record.json` is.

    Raises ArtifactError, naming the place, for a damaged one, one of a newer Heliostat, and one whose files are not
    below its folder.
    """
    try:
        document = json.loads(text)
        known = {field.name for field in fields(Record)}
        newer = document.get("format", FORMAT) > FORMAT or document.keys() - known
        record = None if newer else Record(**document)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:  # the last is JSON that nests without end
        raise ArtifactError(f"{place} is damaged ({error}); delete that folder and run again") from error
    if record is None:
        unknown = f", with {', '.join(sorted(document.keys() - known))}" if document.keys() - known else ""
        raise ArtifactError(
            f"{place} was written by a newer Heliostat (record format {document.get('format', FORMAT)}{unknown}; this "
            f"one reads format {FORMAT}); update this one, or use another storage"
        )
    check_files(record.files, place=place)
    return record


def find_artifact(folder: Path, *, elsewhere: Mapping[Path, int] = MappingProxyType({})) -> Artifact | None:
    """The artifact in a node's folder if the node is done and its files are all there, with their recorded digests.

    `elsewhere` has the sizes of files that can be fetched into the folder. What is fetched is checked then.
    """
    record = read_record(folder)
    if record is None or lacking(folder, record.files, elsewhere=elsewhere):
        return None
    return None if damaged(folder, record.files, elsewhere=elsewhere) else Artifact(folder, record)


def digest_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and sha256 of the named files of a folder. Raises ArtifactError for one that is missing."""
    entries = {}
    for name in sorted(names):
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{path} was announced as part of the artifact, but is not there")
        entries[name] = digest_of(path)
    check_files(entries, place=str(folder))
    return entries


def keep_only(folder: Path, names: Iterable[str]) -> None:
    """Delete what a finished stage left in its folder besides the named files: checkpoints and temporary files."""
    keep = {folder / name for name in names}
    parents = {parent for path in keep for parent in path.parents}
    for path in sorted(folder.iterdir()):
        _drop(path, keep, parents)


def _drop(path: Path, keep: set[Path], parents: set[Path]) -> None:
    if path in keep:
        return
    if path.is_dir() and not path.is_symlink():
        if path not in parents:
            shutil.rmtree(path)
            return
        for child in sorted(path.iterdir()):
            _drop(child, keep, parents)
    else:
        path.unlink()


def records(storage: Path, *, pipeline: str | None = None, stage: str | None = None) -> Iterator[tuple[Path, Record]]:
    """Every readable record of a store with its folder, oldest first.

    Only those that lie where their nodes do: MLflow's artifacts, in the same store, have copies of them.
    """
    found = []
    for path in storage.glob(f"{pipeline or '*'}/{stage or '*'}/*/{RECORD}"):
        try:
            record = read_record(path.parent)
        except ArtifactError:
            continue  # a damaged record is not history; the node that owns it says so when it is planned
        if record is not None and path.parent.parent == storage / record.pipeline / record.stage:
            found.append((path.parent, record))
    yield from sorted(found, key=lambda item: item[1].started_at)
