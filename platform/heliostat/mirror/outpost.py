"""The store on a machine of the cluster that does not see the driver's folder: one of its own, under the same path.

Processes of a stage that run there fetch from the bucket what they go on with, and send there what they leave. They
share what they know of a node's folder, `.outpost.json` in it, and take turns by a lock beside it. What an earlier run
left there is cleared away first: what is not in the bucket is lost. Where a process does see the driver's folder, the
driver sends for it, and it only fetches what other machines have left.
"""

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heliostat.core.artifact import write_json
from heliostat.core.carrier import Files
from heliostat.mirror.bucket import Bucket, sending

STATE = ".outpost.json"


@dataclass(frozen=True)
class Outpost:
    """The Carrier of one node of the plan, by way of a bucket."""

    url: str
    store: Path
    folder: Path
    mark: Path
    """There for who sees the driver's folder, and one of its own for each run."""

    def take(self, folder: Path, files: Files) -> None:
        """See Carrier."""
        if not self._is_home:
            with _held(folder):
                self._open().take(folder, files)

    def fetch(self, folder: Path) -> None:
        """See Carrier."""
        with self._knowing(self._open()) as bucket:
            bucket.fetch(folder)

    def send(self, folder: Path) -> None:
        """See Carrier."""
        with self._knowing(self._open()) as bucket:
            bucket.send(folder)

    @contextmanager
    def following(self) -> Iterator[None]:
        """See Carrier."""
        bucket = self._open()  # once: without a region or an endpoint, its client asks where the bucket is
        with self._knowing(bucket):
            bucket.fetch(self.folder)
        if self._is_home:
            yield
            return

        def send() -> None:
            with self._knowing(bucket):
                bucket.send(self.folder)

        with sending(send, self.folder):
            yield
        send()  # or nobody may go on

    @property
    def _is_home(self) -> bool:
        return self.mark.exists()

    def _open(self) -> Bucket:
        return Bucket(self.url, self.store)

    @contextmanager
    def _knowing(self, bucket: Bucket) -> Iterator[Bucket]:
        """The bucket, with what processes of this machine have sent of the node's folder so far; in turns."""
        with _held(self.folder):
            state = self._state()
            bucket.sent.clear()
            bucket.sent.update({self.folder / name: (size, at) for name, (size, at) in state.items()})
            try:
                yield bucket
            finally:
                now = {path.relative_to(self.folder).as_posix(): list(stamp) for path, stamp in bucket.sent.items()}
                if now != state:
                    write_json(self.folder / STATE, {"run": self.mark.name, "sent": now})

    def _state(self) -> dict[str, list[int]]:
        """What was sent in this run: the size and time of change of each file by its name."""
        path = self.folder / STATE
        if not path.exists():
            return {}
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if state["run"] == self.mark.name:
            sent: dict[str, list[int]] = state["sent"]
            return sent
        if not self._is_home:
            shutil.rmtree(self.folder)
            self.folder.mkdir()
        return {}


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """A node's folder, which is there then, for one process of this machine at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
