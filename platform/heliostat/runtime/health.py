"""`heliostat doctor`: what is wrong with this machine, the cluster and the tracking server, and what to type about it.

Each check is a function that yields findings; one that is not `ok` carries a fix. A check that fails unexpectedly is
itself a finding, because the doctor has to get to the end.
"""

import importlib
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Literal

from heliostat.core.commands import with_store
from heliostat.core.credentials import redacted, without_user
from heliostat.core.spec import BUCKET
from heliostat.core.tracking_uri import why_no_tracking_uri
from heliostat.errors import HeliostatError
from heliostat.mirror import try_bucket
from heliostat.runtime.auth import OPEN, asks_for_token, token_source, use_token_if_present
from heliostat.runtime.embedded import joinable_here

PORTS = {6379: "--port", 8265: "--dashboard-port", 10001: "--ray-client-server-port"}
"""The ports that `ray start --head` takes by default, and the option that chooses another."""
MIN_FREE_GB, SCARCE_FREE_GB = 1, 5
MIN_SHM_GB = 1
MIN_OPEN_FILES = 8192
RAY_TIMEOUT_SECONDS = 10
CONNECT_TIMEOUT_SECONDS = 2

WORKED_IN = ".heliostat"
"""Beside the pipeline file: where a run with a bucket works."""
BUCKET_FIXES = {
    "NETWORK_CONNECTION": "see who answers: curl -I $AWS_ENDPOINT_URL, or without one https://s3.amazonaws.com",
    "not found": "make it: aws s3 mb s3://BUCKET; or is AWS_ENDPOINT_URL another server's?",
    "NO_SUCH_BUCKET": "make it: aws s3 mb s3://BUCKET; or is AWS_ENDPOINT_URL another server's?",
}
BUCKET_RIGHTS = "aws sts get-caller-identity; who that is needs s3:ListBucket, GetObject, PutObject and DeleteObject"

_ASK_RAY = """
import json, sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
print(json.dumps({"nodes": len([n for n in ray.nodes() if n["Alive"]]), "resources": ray.cluster_resources()}))
"""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report; `fix` is what to type or do, empty when all is well."""

    name: str
    ok: Literal["ok", "warning", "problem"]
    text: str
    fix: str = ""


def diagnose(storage: str | Path, tracking_uri: str | None, address: str | None) -> list[Finding]:
    """Look at everything that a run on `storage`, tracked at `tracking_uri`, on the Ray at `address` depends on.

    `address` is what `run --address` or `submit --address` takes; None looks for every Ray on this machine.
    """
    checks: dict[str, Callable[[], Iterable[Finding]]] = {
        "python": check_python,
        "libraries": check_libraries,
        "hyperopt": check_hyperopt,
        "storage": lambda: check_storage(str(storage)),
        "shared memory": check_shared_memory,
        "open files": check_open_files,
        "token": check_token,
        "ray": lambda: check_ray(address),
        "tracking": lambda: check_tracking(tracking_uri, storage),
    }
    with ThreadPoolExecutor(len(checks)) as pool:
        return [finding for found in pool.map(_examine, checks, checks.values()) for finding in found]


def _examine(name: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    try:
        return list(check())
    except Exception as error:
        text = f"this check itself failed: {type(error).__name__}: {error}"
        return [Finding(name, "problem", text, "report it as a bug of heliostat, with this line")]


def check_python() -> Iterator[Finding]:
    """The interpreter against the package's `Requires-Python`."""
    from packaging.specifiers import SpecifierSet

    wanted = metadata.metadata("heliostat")["Requires-Python"]
    running = platform.python_version()
    if running in SpecifierSet(wanted):
        yield Finding("python", "ok", f"{running} at {sys.executable}")
    else:
        yield Finding(
            "python", "problem", f"{running}; heliostat needs {wanted}", "make a virtual environment with Python 3.11"
        )


def check_libraries() -> Iterator[Finding]:
    """Every library that the installed package requires, extras apart."""
    from packaging.requirements import Requirement

    wrong, right = [], []
    for requirement in map(Requirement, metadata.requires("heliostat") or []):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append((requirement, "is not installed"))
            continue
        if requirement.specifier.contains(version, prereleases=True):
            right.append(f"{requirement.name} {version}")
        else:
            wrong.append((requirement, f"{version} is installed; heliostat needs {requirement.specifier}"))
    for requirement, text in wrong:
        yield Finding(requirement.name, "problem", text, f"pip install -c constraints.txt '{requirement}'")
    if not wrong:
        yield Finding("libraries", "ok", ", ".join(right))


def check_hyperopt() -> Iterator[Finding]:
    """Whether HyperOpt imports: old versions need `pkg_resources`, which new setuptools lack."""
    try:
        importlib.import_module("hyperopt")
    except ImportError as error:
        versions = ", ".join(
            f"{name} {metadata.version(name)}" for name in ("hyperopt", "setuptools") if _is_installed(name)
        )
        fix = "pip install 'hyperopt>=0.3', or for an older one pip install 'setuptools<82'"
        yield Finding(
            "hyperopt", "problem", f"does not import ({error}; {versions}): `algorithm: bayesian` would fail", fix
        )
    else:
        yield Finding("hyperopt", "ok", "imports")


def _is_installed(name: str) -> bool:
    return next(iter(metadata.distributions(name=name)), None) is not None


def check_storage(storage: str) -> Iterator[Finding]:
    """Whether the store can be written; of a folder, how much room is left on its disk."""
    if "://" not in storage:
        yield from check_folder(Path(storage))
    elif not BUCKET.fullmatch(storage):
        fix = "--storage s3://BUCKET/PREFIX, or a folder"
        yield Finding("storage", "problem", f"{redacted(storage)} is neither a folder nor s3://BUCKET/PREFIX", fix)
    else:
        yield check_bucket(storage)
        yield from check_folder(Path(WORKED_IN))


def check_bucket(url: str) -> Finding:
    """Whether the bucket can be written, listed and read, and what is in it deleted: by doing so."""
    try:
        try_bucket(url)
    except HeliostatError as error:
        text = str(error).removeprefix("storage: ")
        fix = next((fix for sign, fix in BUCKET_FIXES.items() if sign in text), BUCKET_RIGHTS)
        return Finding("storage", "problem", text, fix)
    return Finding("storage", "ok", f"{url}: can be read and written")


def check_folder(storage: Path) -> Iterator[Finding]:
    """Whether a folder can be written, and how much room is left on its disk."""
    folder = storage.expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        yield Finding(
            "storage", "problem", f"{folder} cannot be written: {error.strerror}", "--set storage=ANOTHER_FOLDER"
        )
        return
    free_gb = shutil.disk_usage(folder).free / 1e9
    text = f"{storage}: writable, {free_gb:.1f} GB free"
    if free_gb >= SCARCE_FREE_GB:
        yield Finding("storage", "ok", text)
    else:
        severity: Literal["warning", "problem"] = "problem" if free_gb < MIN_FREE_GB else "warning"
        yield Finding("storage", severity, text, f"make room on the disk of {folder}, or --set storage=ANOTHER_FOLDER")


def check_shared_memory() -> Iterator[Finding]:
    """The size of `/dev/shm`, where Ray's object store and PyTorch's data workers keep what they share."""
    shm = Path("/dev/shm")
    if not shm.is_dir():
        yield Finding("shared memory", "ok", "no /dev/shm on this system; Ray uses files instead")
        return
    size_gb = shutil.disk_usage(shm).total / 1e9
    if size_gb >= MIN_SHM_GB:
        yield Finding("shared memory", "ok", f"/dev/shm holds {size_gb:.1f} GB")
    else:
        text = f"/dev/shm holds {size_gb:.2f} GB; Ray falls back to slow files on /tmp"
        yield Finding(
            "shared memory", "warning", text, "docker run --shm-size=4g …, or mount -o remount,size=4g /dev/shm"
        )


def check_open_files() -> Iterator[Finding]:
    """The limit of open files: Ray opens several per worker and per connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= MIN_OPEN_FILES:
        yield Finding("open files", "ok", f"at most {'any number' if soft == resource.RLIM_INFINITY else soft}")
    else:
        allowed = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
        yield Finding("open files", "warning", f"at most {soft}; many workers need more", f"ulimit -n {allowed}")


def check_token() -> Iterator[Finding]:
    """Ray's token and the mode that makes Ray use it."""
    source, mode = token_source(), os.environ.get("RAY_AUTH_MODE")
    if mode is not None and mode.lower() not in {"token", "disabled"}:
        yield Finding("token", "problem", f"RAY_AUTH_MODE is {mode!r}", "export RAY_AUTH_MODE=token")
    elif source is None and mode is not None and mode.lower() == "token":
        yield Finding(
            "token", "problem", "RAY_AUTH_MODE is 'token' and there is no token", "ray get-auth-token --generate"
        )
    elif source is None:
        yield Finding("token", "ok", "none; a cluster of your own needs one: ray get-auth-token --generate")
    elif source != "RAY_AUTH_TOKEN" and not Path(source).is_file():
        yield Finding(
            "token", "problem", f"RAY_AUTH_TOKEN_PATH names {source}, which is no file", "unset RAY_AUTH_TOKEN_PATH"
        )
    elif source != "RAY_AUTH_TOKEN" and Path(source).stat().st_mode & 0o077:
        yield Finding("token", "warning", f"{source} can be read by other users of this machine", f"chmod 600 {source}")
    elif mode is None:
        text = f"in {source}; heliostat uses it, `ray status` and `ray job` only with RAY_AUTH_MODE=token in the shell"
        yield Finding("token", "ok", text)
    else:
        yield Finding("token", "ok", f"in {source}, RAY_AUTH_MODE={mode}")


def check_ray(address: str | None) -> Iterator[Finding]:
    """The Ray at `address`, or one on this machine, or whether the ports are free to start one."""
    use_token_if_present()
    if address is not None and address.startswith(("http://", "https://")):
        yield _dashboard(address)
        yield from check_asks_for_token(address)
        return
    local = joinable_here()
    if address is None and not local:
        yield Finding("ray", "ok", "none is running here; `heliostat run` starts its own")
        yield from check_ports()
    elif address is None:
        with ThreadPoolExecutor() as pool:  # nobody asked for these, and they may be others': not our problem
            for finding in pool.map(_cluster, sorted(local)):
                yield finding if finding.ok == "ok" else replace(finding, ok="warning")
        for here in sorted(local):
            yield from check_asks_for_token(here)
    elif address == "auto" and not local and "RAY_ADDRESS" not in os.environ:
        yield Finding("ray", "problem", "none is running here", "ray start --head")
    else:
        yield _cluster(address)
        yield from check_asks_for_token(
            os.environ.get("RAY_ADDRESS", min(local, default="")) if address == "auto" else address
        )


def check_asks_for_token(address: str) -> Iterator[Finding]:
    """Whether the Ray there lets in everybody."""
    if asks_for_token(address) is False:
        problem, _, fix = OPEN.partition("; ")
        yield Finding("token", "warning", f"{address} {problem}", fix)


def check_ports() -> Iterator[Finding]:
    """The ports of `ray start --head`; a Ray that heliostat starts for itself takes none of them."""
    for port, option in PORTS.items():
        with socket.socket() as probe:
            taken = probe.connect_ex(("127.0.0.1", port)) == 0
        if taken:
            fix = f"see who: ss -ltnp 'sport = :{port}'; or ray start --head {option}=ANOTHER"
            yield Finding(f"port {port}", "warning", "another program listens on it, so `ray start --head` cannot", fix)


def _dashboard(address: str) -> Finding:
    from heliostat.runtime.jobs import cluster_version

    try:
        theirs = cluster_version(address)
    except HeliostatError as error:
        return Finding("ray", "problem", str(error), f"curl {address}/api/version")
    ours = metadata.version("ray")
    if theirs != ours:
        return Finding(
            "ray",
            "problem",
            f"{address} runs Ray {theirs}, and this is {ours}",
            f"pip install 'ray=={theirs}', here or there",
        )
    return Finding("ray", "ok", f"{address} answers, Ray {theirs}")


def _cluster(address: str) -> Finding:
    """Connect from a process of its own: Ray can end the process that it fails in, and can wait for long."""
    if (refused := _refused(address)) is not None:
        return Finding(
            "ray",
            "problem",
            f"nothing answers at {address} ({refused})",
            "ray start --head on that machine; then its firewall",
        )
    command = [sys.executable, "-c", _ASK_RAY, address]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=RAY_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return Finding(
            "ray",
            "problem",
            f"{address} does not answer within {RAY_TIMEOUT_SECONDS} s",
            "RAY_AUTH_MODE=token ray status",
        )
    if asked.returncode != 0:
        reason = asked.stderr.strip().splitlines()[-1] if asked.stderr.strip() else f"exit code {asked.returncode}"
        fix = "the head node's token in ~/.ray/auth_token, and the same ray and python here and there; then ray status"
        return Finding("ray", "problem", f"{address}: {reason}", fix)
    cluster = json.loads(asked.stdout.strip().splitlines()[-1])
    cpus, gpus, memory = (cluster["resources"].get(name, 0) for name in ("CPU", "GPU", "memory"))
    held = f"{cluster['nodes']} node(s), {cpus:g} CPU, {gpus:g} GPU, {memory / 1e9:.1f} GB"
    return Finding("ray", "ok", f"{address}: {held}, Ray {metadata.version('ray')}")


def _refused(address: str) -> OSError | None:
    """Why no connection to `host:port` or `ray://host:port` can be made; None when one can, or it is not such."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return None
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_SECONDS).close()
    except OSError as error:
        return error
    return None


def check_keyring() -> Iterator[Finding]:
    """MLflow's file of passwords, if there is one: it is for its owner alone."""
    file = Path("~/.mlflow/credentials").expanduser()
    if file.is_file() and file.stat().st_mode & 0o077:
        yield Finding("keyring", "warning", f"{file} can be read by other users of this machine", f"chmod 600 {file}")


def check_tracking(tracking_uri: str | None, storage: str | Path = ".heliostat") -> Iterator[Finding]:
    """Whether an MLflow server answers; a store in a file needs none."""
    yield from check_keyring()
    tracking_uri = without_user(tracking_uri) if tracking_uri else None
    problem = why_no_tracking_uri(tracking_uri) if tracking_uri else None
    if problem:
        yield Finding("tracking", "problem", f"{tracking_uri}: {problem}", "--set tracking.uri=ANOTHER")
        return
    if tracking_uri is None or not tracking_uri.startswith(("http://", "https://")):
        yield Finding("tracking", "ok", f"{tracking_uri or 'SQLite under the storage folder'}; no server needed")
        return
    try:
        with urllib.request.urlopen(f"{tracking_uri.rstrip('/')}/health", timeout=CONNECT_TIMEOUT_SECONDS):
            yield Finding("tracking", "ok", f"{tracking_uri} answers")
    except urllib.error.HTTPError as error:
        yield Finding(
            "tracking",
            "problem",
            f"{tracking_uri} answers {error.code} to /health",
            "is this the root of an MLflow server?",
        )
    except OSError as error:
        reason = getattr(error, "reason", error)
        text = f"{tracking_uri} does not answer ({reason}); runs go on, and what they log is kept for later"
        yield Finding(
            "tracking",
            "warning",
            text,
            f"mlflow server --host 127.0.0.1 --port 5000, then {with_store('sync', Path(storage))}",
        )
