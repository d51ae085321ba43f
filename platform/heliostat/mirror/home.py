"""The driver's end of a store in a bucket, and what other machines of its cluster are told of it."""

import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from heliostat.core.carrier import HERE, Carrier
from heliostat.mirror.bucket import Bucket, lasting_files, sending
from heliostat.mirror.outpost import Outpost


class BucketMirror(Bucket):
    """See Mirror."""

    _mark: Path | None = None
    """A file that tells those who see it that they see the driver's folder; None where nobody else looks."""

    @contextmanager
    def on_cluster(self) -> Iterator[None]:
        """See Mirror."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._mark = self._folder / f".driver-{uuid.uuid4().hex}"
        self._mark.touch()
        try:
            yield
        finally:
            self._mark.unlink()
            self._mark = None

    def carrier(self, folder: Path) -> Carrier:
        """See Mirror."""
        return Outpost(self._url, self._folder, folder, self._mark) if self._mark else HERE

    def fetch(self, folder: Path) -> None:
        """See Mirror."""
        super().fetch(folder)
        if self._mark:
            self.send(folder)

    @contextmanager
    def following(self, folder: Path, *, anew: bool) -> Iterator[Callable[[Iterable[str]], None]]:
        """See Mirror."""
        if anew:
            self.forget(folder)
        else:
            self.fetch(folder)
        before = dict(lasting_files(folder))

        def exchange(names: Iterable[str]) -> None:
            if self._mark:
                now = dict(lasting_files(folder))
                made_here = {path for path, stamp in now.items() if before.get(path) != stamp}
                self.fetch_files({folder / name for name in names} - made_here)
                send()

        with sending(lambda: self.send(folder), folder) as send:
            yield exchange
