"""Pipelines as Ray jobs: ship a pipeline's folder to a cluster, run `heliostat run` there, follow its output.

The job belongs to the cluster, not to the terminal: closing or interrupting the client only ends the following. What
a job writes into its own folder is lost with it, so a pipeline that names no lasting storage gets
`~/heliostat/<pipeline>` on the head node; submitting the same file again resumes there. On several nodes the storage
must be a folder that all of them see.
"""

import asyncio
import logging
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heliostat.core.commands import SUBMITTED_AS, Given, submit_again
from heliostat.core.credentials import PASSWORD, USER, has_credentials, redacted, with_user, without_user
from heliostat.core.load import apply_setting, read_document
from heliostat.errors import HeliostatError, SpecError
from heliostat.runtime.auth import OPEN, asks_for_token, token_advice, use_token_if_present

EXCLUDED = (
    ".git",
    ".heliostat",
    ".venv",
    "venv",
    "__pycache__",
    "mlruns",
    ".mypy_cache",
    ".pytest_cache",
    ".ruff_cache",
)
"""Names of files and folders that never travel to the cluster, at any depth."""
UPLOAD_LIMIT_MB = 100
"""What the dashboard accepts in one upload (`DASHBOARD_CLIENT_MAX_SIZE`)."""
POLL_SECONDS = 1.0

# A job inherits the PATH of whoever typed `ray start`, which need not name Ray's own environment. The supervisor that
# starts this shell has loaded Ray from it, so the supervisor's memory map tells where its Python is.
_FIND_PYTHON = (
    r"PYTHON=$(sed -n 's@^[^/]*\(/.*\)/lib/python3[^/]*/site-packages/ray/_raylet\.so$@\1/bin/python@p' "
    "/proc/$PPID/maps | head -n 1); "
    '[ -x "$PYTHON" ] || PYTHON=python; '
)


@dataclass(frozen=True)
class JobResult:
    """How a job stands: Ray's status (`PENDING`, `RUNNING`, `SUCCEEDED`, `FAILED`, `STOPPED`) and an exit code."""

    job_id: str
    status: str
    message: str
    exit_code: int


def submit(
    file: Path,
    *,
    address: str,
    settings: Sequence[str] = (),
    follow: bool = True,
    echo: Callable[[str], None],
    _module: str = "heliostat.cli",
) -> JobResult:
    """Run the pipeline in `file` as a job on the cluster whose dashboard is at `address` (`http://HEAD:8265`).

    `settings` are `--set` values. With `follow`, every line of the job's output goes to `echo` until the job ends, and
    the result has the job's own exit code; without, it is returned as soon as the job is accepted, with exit code 0.
    Raises SpecError when the file, a setting or the size of the folder is wrong; HeliostatError when the cluster does
    not answer, refuses the token, or already runs this pipeline on this storage.
    """
    document = read_document(file)
    for setting in settings:
        if has_credentials(setting):
            raise SpecError(
                f"--set {redacted(setting).partition('=')[0]}: whoever sees the job would see the password; set "
                f"{USER} and {PASSWORD}, or the variable of `env:NAME`, on the cluster's nodes, or write it in {file}"
            )
        apply_setting(document, setting)
    address = without_user(address)
    name = document.get("name")
    if not isinstance(name, str) or not name:
        raise SpecError(f"{file}: name: missing; it is required")
    folder = file.resolve().parent
    check_upload(folder)
    given = Given(file, settings, address)
    if has_credentials(str(document.get("storage"))):
        raise SpecError("storage: leave out the credentials; the cluster's nodes take them from their environment")
    storage = _lasting_storage(document.get("storage"), name)
    with _connection(address) as client:
        _refuse_twice(client, address, name, storage)
        job_id = client.submit_job(
            entrypoint=_entrypoint(file.name, settings, storage, _module, submit_again(given)),
            runtime_env={"working_dir": str(folder), "excludes": [*EXCLUDED, "*.pyc"]},
            metadata={"heliostat.pipeline": name, "heliostat.storage": storage},
        )
        echo(f"job {job_id}: pipeline {name} on {address}, storage {storage} on the cluster")
        if asks_for_token(address) is False:
            echo(f"warning: {address} {OPEN}")
        echo(f"it goes on if this terminal closes; to follow it again: {follow_command(job_id, address)}")
        if not follow:
            return JobResult(job_id, str(client.get_job_status(job_id).value), "submitted", 0)
        return _follow(client, job_id, address, echo)


def follow(job_id: str, *, address: str, echo: Callable[[str], None]) -> JobResult:
    """Print the output of a job, from its start, until it ends. Raises HeliostatError when there is no such job."""
    address = without_user(address)
    with _connection(address) as client:
        return _follow(client, job_id, address, echo)


def cluster_version(address: str) -> str:
    """The version of Ray behind the dashboard at `address`. Raises HeliostatError when it does not answer."""
    with _connection(address) as client:
        return str(client._server_ray_version)  # `get_version()` is the version of the API, not of Ray


def follow_command(job_id: str, address: str) -> str:
    """What to type to see a job's output again."""
    return f"RAY_AUTH_MODE=token ray job logs {job_id} --follow --address {address}"


def stop_command(job_id: str, address: str) -> str:
    """What to type to end a job."""
    return f"RAY_AUTH_MODE=token ray job stop {job_id} --address {address}"


def check_upload(folder: Path) -> None:
    """Raise SpecError that names the largest entries when `folder` is too big to travel as one upload."""
    sizes = {entry.name: _size_bytes(entry) for entry in folder.iterdir() if _travels(entry)}
    total_mb = sum(sizes.values()) / 2**20
    if total_mb >= UPLOAD_LIMIT_MB:
        largest = sorted(sizes, key=lambda n: sizes[n], reverse=True)[:3]
        listed = ", ".join(f"{n} ({sizes[n] / 2**20:.1f} MB)" for n in largest)
        raise SpecError(
            f"{folder}: {total_mb:.1f} MB would travel with the job, and the limit is {UPLOAD_LIMIT_MB} MB; "
            f"largest: {listed}. Keep data outside this folder, or name it in a .rayignore file"
        )


def _travels(entry: Path) -> bool:
    return entry.name not in EXCLUDED and entry.suffix != ".pyc"


def _size_bytes(entry: Path) -> int:
    from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

    if any(ignored(entry) for ignored in get_excludes_from_ignore_files(entry.parent, include_gitignore=True)):
        return 0
    if entry.is_dir():
        return sum(_size_bytes(child) for child in entry.iterdir() if _travels(child))
    return entry.stat().st_size if entry.is_file() else 0


def _lasting_storage(storage: object, name: str) -> str:
    """The storage that was asked for, unless it would lie in the pipeline's folder, which is lost with the job."""
    lasting = isinstance(storage, str) and ("://" in storage or storage.startswith(("/", "~/")))
    return str(storage) if lasting else f"~/heliostat/{name}"


def _entrypoint(file: str, settings: Sequence[str], storage: str, module: str, submitted_as: str) -> str:
    words = ["-m", module, "run", file, "--address", "auto", *(word for s in settings for word in ("--set", s))]
    home, path = ('"$HOME"/', storage[2:]) if storage.startswith("~/") else ("", storage)  # the home on the head node
    command = f'"$PYTHON" {shlex.join(words)} --set storage={home}{shlex.quote(path)}'
    # Both the job and the run inside it name a working_dir, the same one; Ray refuses that unless told which counts.
    again = f"{SUBMITTED_AS}={shlex.quote(submitted_as)}"
    return f"{_FIND_PYTHON}export RAY_OVERRIDE_JOB_RUNTIME_ENV=1 {again}; exec {command}"


def _refuse_twice(client: Any, address: str, name: str, storage: str) -> None:
    same = {"heliostat.pipeline": name, "heliostat.storage": storage}
    for job in client.list_jobs():
        if job.status in {"PENDING", "RUNNING"} and same.items() <= (job.metadata or {}).items():
            raise HeliostatError(
                f"job {job.submission_id} already runs pipeline {name} on {storage}; to follow it: "
                f"{follow_command(job.submission_id, address)}; to stop it: {stop_command(job.submission_id, address)}"
            )


@contextmanager
def _connection(address: str) -> Iterator[Any]:
    """A client of the job server at `address`, with Ray's errors turned into what to do about them."""
    if not address.startswith(("http://", "https://")):
        raise SpecError(
            f"--address {address}: a job is submitted to the dashboard of the head node, such as http://HEAD:8265"
        )
    has_token = use_token_if_present()
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for logger in (
        "ray.dashboard.modules.dashboard_sdk",
        "ray.dashboard.modules.job.sdk",
        "ray._private.runtime_env.packaging",
    ):
        logging.getLogger(logger).setLevel(logging.WARNING)
    # Ray lets these variables override the address that it is given.
    hidden = {v: os.environ.pop(v) for v in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS") if v in os.environ}
    try:
        yield JobSubmissionClient(with_user(address))
    except AuthenticationError as error:
        raise HeliostatError(f"{address}: {token_advice(has_token)}") from error
    except ConnectionError as error:
        raise HeliostatError(
            f"{address}: nothing answers; is the cluster up, is 8265 the port of its dashboard, can it be reached "
            "from here? For a cloud or Kubernetes, open the tunnel that the file in cluster/ names first"
        ) from error
    except RuntimeError as error:
        raise HeliostatError(f"{address}: {error}") from error
    finally:
        os.environ.update(hidden)


def _follow(client: Any, job_id: str, address: str, echo: Callable[[str], None]) -> JobResult:
    try:
        asyncio.run(_echo_output(client, job_id, echo))
    except KeyboardInterrupt:
        echo(f"job {job_id} goes on; to follow it again: {follow_command(job_id, address)}")
        echo(f"to stop it: {stop_command(job_id, address)}")
        return JobResult(job_id, str(client.get_job_status(job_id).value), "no longer followed", 130)
    info = client.get_job_info(job_id)
    while not info.status.is_terminal():
        time.sleep(POLL_SECONDS)
        info = client.get_job_info(job_id)
    code = {"SUCCEEDED": 0, "STOPPED": 130}.get(info.status.value, info.driver_exit_code or 1)
    return JobResult(job_id, str(info.status.value), (info.message or "").splitlines()[0] if info.message else "", code)


async def _echo_output(client: Any, job_id: str, echo: Callable[[str], None]) -> None:
    """Echo whole lines of the job's output until it ends; after a dropped connection go on where it broke off."""
    import aiohttp

    echoed = 0  # lines; the server starts from the first one whenever it is asked
    while True:
        seen, rest = 0, ""
        try:
            async for chunk in client.tail_job_logs(job_id):
                *lines, rest = (rest + chunk).split("\n")
                for line in lines:
                    seen += 1
                    if seen > echoed:
                        echo(line)
                        echoed = seen
            if rest and seen >= echoed:
                echo(rest)
            return
        except (aiohttp.ClientError, RuntimeError):
            client.get_job_status(
                job_id
            )  # raises when the cluster or the job is gone, and then there is nothing to follow
            await asyncio.sleep(POLL_SECONDS)
