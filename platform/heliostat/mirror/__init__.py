"""The lasting end of a store whose `storage` is `s3://bucket/prefix`: what a machine may lose and a run may not.

Stages work in the store's folder on this machine, as ever; each file of a node's folder has its place below the URL.
What a stage leaves while it runs, its checkpoints or the journal of a search, is sent every few seconds; the files of a
finished node are sent before its record, so a record in the bucket says what one in a folder says. An object appears
when all of it has arrived. Another machine reads the records when it plans, fetches the files of what it reuses, and
goes on with what an interrupted stage had sent.

On a cluster a process of a stage may run on a machine that does not see that folder. It works through an `Outpost`,
which does the same for it there.

The bucket is one for all who use it, but a pipeline should run once at a time: the lock of a store is of one machine.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from heliostat.core.carrier import HERE, Carrier
from heliostat.core.spec import Pipeline
from heliostat.mirror.bucket import Bucket
from heliostat.mirror.home import BucketMirror

__all__ = ["Exchange", "Mirror", "NoMirror", "mirror_of", "try_bucket"]

Exchange = Callable[[Iterable[str]], None]


class Mirror(Protocol):
    """What a run asks of its mirror. Each method raises ArtifactError when the other end cannot do it."""

    def look(self, pipeline: str) -> Mapping[Path, int]:
        """The size of every file that is there, by its place in the folder. The records are here afterwards.

        Raises SpecError when nobody answers.
        """

    def fetch(self, folder: Path) -> None:
        """Bring what a node's folder lacks; of a file that grows, such as a journal, the longer one is the later.

        On a cluster both ends have it then, so that other machines can fetch it.
        Raises ArtifactError too where a file is not the one that the record tells of.
        """

    def send(self, *paths: Path) -> None:
        """Send these files, and of these folders all that has changed."""

    def following(self, folder: Path, *, anew: bool) -> AbstractContextManager[Exchange]:
        """Go on with what the other end has of a node's folder (`anew`: forget it), and send what the block leaves.

        Gives a function that, on a cluster, has both ends agree: of the files named, those that were made on other
        machines in this block come here, and what was made here goes there. What cannot be sent by its end waits for
        `send`.
        """

    def on_cluster(self) -> AbstractContextManager[None]:
        """Within it, processes of stages may run on machines that do not see the folder."""

    def carrier(self, folder: Path) -> Carrier:
        """What the processes that make a node work through."""


def mirror_of(pipeline: Pipeline) -> Mirror:
    """The mirror of the pipeline's store. Raises SpecError when there is no such bucket."""
    if pipeline.bucket_url is None:
        return NoMirror()
    return BucketMirror(pipeline.bucket_url, pipeline.storage_folder)


def try_bucket(url: str) -> None:
    """Write a small object below the URL, list, read and delete it.

    Raises SpecError when there is no such bucket or nobody answers, ArtifactError that says what else cannot be done.
    """
    Bucket(url, Path()).try_out()


class NoMirror:
    """The store is a folder, and that is all."""

    def look(self, pipeline: str) -> Mapping[Path, int]:
        return {}

    def fetch(self, folder: Path) -> None: ...

    def send(self, *paths: Path) -> None: ...

    @contextmanager
    def following(self, folder: Path, *, anew: bool) -> Iterator[Exchange]:
        yield lambda names: None

    @contextmanager
    def on_cluster(self) -> Iterator[None]:
        yield

    def carrier(self, folder: Path) -> Carrier:
        return HERE
