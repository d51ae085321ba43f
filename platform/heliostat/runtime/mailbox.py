"""How a process of the cluster tells the driver what is happening while it works.

Messages are entries of the key-value store that every Ray cluster has, so no process is started for them and nobody
waits: the sender puts, and a thread of the driver collects a few times a second, in order.
"""

import itertools
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from ray.experimental import internal_kv

from heliostat.core.stage import Reporter

POLL_S = 0.2
_count = itertools.count()


@dataclass(frozen=True)
class RemoteReporter:
    """A reporter that can be sent to another process; what it is told arrives at the driver's own."""

    box: str

    def began(self, at: float | None = None) -> None:
        self._send("began", [time.time() if at is None else at])

    def metrics(self, values: Mapping[str, float], *, step: int, trial: str | None = None) -> None:
        self._send("metrics", [dict(values)], step=step, trial=trial)

    def trial_started(self, trial: str, params: Mapping[str, Any]) -> None:
        self._send("trial_started", [trial, dict(params)])

    def trial_ended(
        self,
        trial: str,
        status: Literal["done", "stopped", "failed"],
        *,
        metrics: Mapping[str, float],
        best_epoch: int = 0,
        seconds: float | None = None,
        reason: str | None = None,
    ) -> None:
        told = {"metrics": dict(metrics), "best_epoch": best_epoch, "seconds": seconds, "reason": reason}
        self._send("trial_ended", [trial, status], **told)

    def progress(self, **fields: Any) -> None:
        self._send("progress", [], **fields)

    def warn(self, text: str) -> None:
        self._send("warn", [text])

    def ask_to_stop(self) -> None:
        """Called by the driver: whoever works at the other end should end what it does."""
        internal_kv._internal_kv_put(f"{self.box}.stop".encode(), b"")

    def is_asked_to_stop(self) -> bool:
        return bool(internal_kv._internal_kv_exists(f"{self.box}.stop".encode()))

    def _send(self, method: str, args: list[Any], **kwargs: Any) -> None:
        key = f"{self.box}/{time.time_ns():020d}/{os.getpid()}/{next(_count):08d}"
        internal_kv._internal_kv_put(key.encode(), json.dumps([method, args, kwargs]).encode())


@contextmanager
def relay(reporter: Reporter) -> Iterator[RemoteReporter]:
    """A remote end for `reporter`. All that was sent through it has arrived when the block ends."""
    remote = RemoteReporter(f"heliostat/{uuid.uuid4().hex}")
    over = threading.Event()

    def collect() -> None:
        while not over.wait(POLL_S):
            _deliver(remote.box, reporter)

    thread = threading.Thread(target=collect, name="heliostat-relay", daemon=True)
    thread.start()
    try:
        yield remote
    finally:
        over.set()
        thread.join()
        _deliver(remote.box, reporter)


def _deliver(box: str, reporter: Reporter) -> None:
    for key in sorted(internal_kv._internal_kv_list(f"{box}/".encode())):
        method, args, kwargs = json.loads(internal_kv._internal_kv_get(key))
        deliver: Callable[..., None] = getattr(reporter, method)
        deliver(*args, **kwargs)
        internal_kv._internal_kv_del(key)
