"""How a process of a stage comes to files of the store when its machine does not see the driver's folder.

It works in a folder of the same path on its own machine. A carrier brings there what it needs, and takes from there
what it leaves. A stage that runs as a Ray task knows nothing of it; one that starts processes itself hands it on.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

Arguments = ParamSpec("Arguments")
R = TypeVar("R")

Files = Mapping[str, Mapping[str, Any]]
"""As in a record: `{relative name: {"sha256", "bytes"}}`."""


class Carrier(Protocol):
    """That of one node of the plan, whose folder it knows. It can be pickled; each method may raise ArtifactError."""

    def take(self, folder: Path, files: Files) -> None:
        """Have these files of another node, or of this one when it is made, on this machine."""

    def fetch(self, folder: Path) -> None:
        """Bring what this machine lacks of a folder in the node's own."""

    def send(self, folder: Path) -> None:
        """Send all that is new in a folder in the node's own, and return when it has arrived."""

    def following(self) -> AbstractContextManager[None]:
        """Go on with what others left in the node's folder, and send what the block leaves, while it runs and after."""


class Here:
    """The carrier where all machines see one folder: there is nothing to carry."""

    def take(self, folder: Path, files: Files) -> None: ...
    def fetch(self, folder: Path) -> None: ...
    def send(self, folder: Path) -> None: ...

    @contextmanager
    def following(self) -> Iterator[None]:
        yield


HERE = Here()


def supplied(
    carrier: Carrier,
    needed: Mapping[Path, Files],
    function: Callable[Arguments, R],
    /,
    *args: Arguments.args,
    **kwargs: Arguments.kwargs,
) -> R:
    """`function(...)` where the files that it needs, of each folder, are at hand."""
    for folder, files in needed.items():
        carrier.take(folder, files)
    return function(*args, **kwargs)


def followed(
    carrier: Carrier,
    needed: Mapping[Path, Files],
    function: Callable[Arguments, R],
    /,
    *args: Arguments.args,
    **kwargs: Arguments.kwargs,
) -> R:
    """`supplied`, for what works in the folder of the carrier's node."""
    with carrier.following():
        return supplied(carrier, needed, function, *args, **kwargs)
