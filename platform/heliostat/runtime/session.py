"""A Ray to run on, for as long as a `with` block lasts: one of its own, or one that is running already.

What Ray and its workers say goes to a log file and never to the terminal: Python's loggers and warnings, what workers
print, and what C++ code writes to file descriptor 2. The latter points at the log during the session, while
`sys.stderr` keeps writing to where it wrote before.
"""

import importlib
import logging
import os
import socket
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from heliostat.core.capacity import Capacity
from heliostat.core.plan import Plan
from heliostat.errors import HeliostatError, SpecError
from heliostat.runtime.auth import OPEN, asks_for_token, is_let_in, token_advice, use_token_if_present
from heliostat.runtime.embedded import joinable_here, start_embedded
from heliostat.runtime.environment import SWITCHES

SHIPPED_EXCEPT = [".git", ".venv", ".heliostat", "__pycache__", "*.pyc"]
"""What of the pipeline's folder does not travel to a cluster."""

CONNECT_TIMEOUT_S = 5.0
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@dataclass(frozen=True)
class Session:
    """A live connection to Ray."""

    embedded: bool
    log: Path
    warning: str | None = None
    """What a person should know of the Ray that is connected to."""

    def capacity(self) -> Capacity:
        return cluster_capacity()

    def check_storage(self, planned: Plan) -> None:
        """Raises SpecError where another machine of the cluster cannot come to what stages leave."""
        from heliostat.runtime.shared_disk import check_storage

        if not self.embedded:
            check_storage(planned)


def cluster_capacity() -> Capacity:
    """That of the nodes there are now."""
    import ray

    return Capacity.of(node["Resources"] for node in ray.nodes() if node["Alive"])


@contextmanager
def start(
    address: str | None = None, *, log: Path, root: Path, num_cpus: int | None = None, preload: Iterable[str] = ()
) -> Iterator[Session]:
    """Start an embedded Ray, or connect to the one at `address` (`auto`, `host:port`, `ray://host:port`).

    `root` is the folder of the user's modules; it is shipped to a cluster. The modules of `preload` are imported
    meanwhile: for half of its start Ray waits. The embedded Ray ends with the block, and with the process whatever ends
    it. The kernel ties it to the *thread* that enters the block: that thread must live as long as the session. Raises
    SpecError when nothing answers at `address`.
    """
    import ray

    log.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        sink = stack.enter_context(open(log, "a", buffering=1, encoding="utf-8", errors="replace"))
        stack.enter_context(_quiet(sink))
        preloading = threading.Thread(target=import_all, args=(list(preload),), name="preload", daemon=True)
        preloading.start()
        warning = None
        try:
            if address is None:
                temp = stack.enter_context(_private_folder())
                start_embedded(temp=temp, logging_format=LOG_FORMAT, num_cpus=num_cpus)
            else:
                address = _answering(address)
                warning = _warning_of(address)
                ray.init(address=address, logging_format=LOG_FORMAT, runtime_env=_shipped(root))
        except (OSError, RuntimeError, ValueError) as error:
            if address is None:
                raise HeliostatError(f"an embedded Ray does not start: {error} (Ray's own log: {log})") from error
            raise SpecError(f"--address {address}: no Ray answers there: {error} (Ray's own log: {log})") from error
        stack.callback(_end)
        preloading.join()
        yield Session(embedded=address is None, log=log, warning=warning)


def import_all(modules: Iterable[str]) -> None:
    """Before stages run, which may do so side by side: of modules that import each other in a circle, as Tune's and
    Train's do, two threads at once get a half of them each, and an ImportError."""
    for module in modules:
        importlib.import_module(module)


def _answering(address: str) -> str:
    """The address to connect to. Raises ConnectionError at once where nothing listens: Ray would try for minutes."""
    if address == "auto" and not os.environ.get("RAY_ADDRESS"):
        from ray._private.services import find_bootstrap_address

        found = joinable_here()
        if not found:
            raise ConnectionError("none runs on this machine that others may join; start one: ray start --head")
        latest = find_bootstrap_address(None)
        return latest if latest in found else min(found)
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    return address


def _warning_of(address: str) -> str | None:
    """That the Ray there lets in everybody. Raises SpecError where it does not let in this process."""
    has_token = use_token_if_present()
    asks = None if address == "auto" else asks_for_token(address)
    if asks and not is_let_in(address):
        raise SpecError(f"--address {address}: {token_advice(has_token)}")
    return f"the Ray at {address} {OPEN}" if asks is False else None


def _shipped(root: Path) -> dict[str, Any]:
    """One runtime environment for all that runs in the session, so that Ray can use a worker again for any of it."""
    return {
        "working_dir": str(root),
        "excludes": SHIPPED_EXCEPT,
        "env_vars": {name: os.environ[name] for name in SWITCHES},
    }


@contextmanager
def _private_folder() -> Iterator[Path]:
    """A folder of the session that no other user can look into. Ray opens its own for everybody, so it lies in another.

    It is in `/tmp`, since the path of a Unix socket has 107 characters at most; `TMPDIR` may be long.
    """
    with tempfile.TemporaryDirectory(prefix="heliostat-", dir="/tmp", ignore_cleanup_errors=True) as private:
        yield Path(private, "ray")


def _end() -> None:
    import ray

    from heliostat.runtime.standby import forget

    forget()
    ray.shutdown()


@contextmanager
def _worker_output_to(sink: TextIO) -> Iterator[None]:
    """Every line that Ray would print in the driver, its own notices to standard output among them, goes this way."""
    from ray._private import worker

    def write(batch: Mapping[str, Any], *_: Any, **__: Any) -> None:
        if batch["pid"] == "autoscaler":  # of a cluster: a table of what is idle, every few seconds
            return
        source = f"({batch.get('actor_name') or batch.get('task_name') or 'ray'} pid={batch['pid']})"
        sink.writelines(f"{source} {line}\n" for line in batch["lines"])

    printing = worker.print_worker_logs
    worker.print_worker_logs = write
    try:
        yield
    finally:
        worker.print_worker_logs = printing


@contextmanager
def _quiet(sink: TextIO) -> Iterator[None]:
    with _loggers_to(sink), _warnings_to(sink), _worker_output_to(sink), _stderr_fd_to(sink):
        yield


@contextmanager
def _loggers_to(sink: TextIO) -> Iterator[None]:
    logger = logging.getLogger("ray")
    handler = logging.StreamHandler(sink)
    before = logger.handlers[:], logger.propagate, logger.level
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before[:2]
        logger.setLevel(before[2])


@contextmanager
def _warnings_to(sink: TextIO) -> Iterator[None]:
    """Send the warnings that Ray's own modules raise to `sink`; others are shown as before."""
    show = warnings.showwarning

    def filtered(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        if f"{os.sep}ray{os.sep}" in filename:
            sink.write(warnings.formatwarning(message, category, filename, lineno, line))
        else:
            show(message, category, filename, lineno, file, line)

    warnings.showwarning = filtered
    try:
        yield
    finally:
        warnings.showwarning = show


@contextmanager
def _stderr_fd_to(sink: TextIO) -> Iterator[None]:
    saved = os.dup(2)
    stderr = sys.stderr
    with open(os.dup(saved), "w", buffering=1, encoding="utf-8", errors="backslashreplace") as terminal:
        if _writes_to_fd_2(stderr):
            sys.stderr = terminal
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            if sys.stderr is terminal:
                sys.stderr = stderr


def _writes_to_fd_2(stream: TextIO) -> bool:
    try:
        return stream.fileno() == 2
    except (OSError, ValueError, AttributeError):
        return False
