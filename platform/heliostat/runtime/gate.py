"""A gate on each node that keeps it quiet while a latency is measured: a busy neighbour would falsify it.

Trials at work hold it together; a measurement holds it alone. Between two steps a trial gives way, which takes the time
of four system calls where nobody waits. Whoever waits to be alone closes a turnstile in front of the gate, so that the
trials at work come out and none goes in. These are locks of the kernel on two files (`flock`), which it releases when
a process dies, however it dies.
"""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from heliostat.runtime.hang import waiting


class Gate:
    """One party's way through the gate in `folder`; used by one thread."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._turnstile = os.open(folder / "turnstile", os.O_RDWR | os.O_CREAT, 0o600)
        self._gate = os.open(folder / "gate", os.O_RDWR | os.O_CREAT, 0o600)

    def close(self) -> None:
        os.close(self._gate)
        os.close(self._turnstile)

    def _enter(self) -> None:
        with waiting():
            fcntl.flock(self._turnstile, fcntl.LOCK_EX)
            fcntl.flock(self._gate, fcntl.LOCK_SH)
            fcntl.flock(self._turnstile, fcntl.LOCK_UN)

    def _leave(self) -> None:
        fcntl.flock(self._gate, fcntl.LOCK_UN)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        self._enter()
        try:
            yield
        finally:
            self._leave()

    def give_way(self) -> None:
        """While at work: let those measure who wait for it."""
        self._leave()
        self._enter()

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """While at work: be no neighbour to anybody, and wait for others, for a while."""
        self._leave()
        try:
            with waiting():
                yield
        finally:
            self._enter()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While at work: be the only one on this node for a while."""
        self._leave()
        try:
            with waiting():
                fcntl.flock(self._turnstile, fcntl.LOCK_EX)
                fcntl.flock(self._gate, fcntl.LOCK_EX)
            yield
        finally:
            fcntl.flock(self._gate, fcntl.LOCK_UN)
            fcntl.flock(self._turnstile, fcntl.LOCK_UN)
            self._enter()


@contextmanager
def gate_of_this_node() -> Iterator[Gate]:
    """A way through the gate that all processes of a user on this node share."""
    gate = Gate(Path(tempfile.gettempdir(), f"heliostat-{os.getuid()}"))
    try:
        yield gate
    finally:
        gate.close()
