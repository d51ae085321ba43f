"""The way to MLflow's own pages: the command that serves an embedded store, and the address of a run."""

import sys

from heliostat.errors import HeliostatError
from heliostat.tracking.writer import absolute_uri, database_path

HOST = "127.0.0.1"
PORT = 5000


def command(uri: str, *, port: int = PORT) -> list[str]:
    """The command that serves the store at `uri` to this machine only. Run it with `quiet.environment()`.

    Raises HeliostatError for a server, which has pages of its own.
    """
    if uri.startswith(("http://", "https://")):
        raise HeliostatError(f"the tracking server has its own pages: open {uri}")
    uri = absolute_uri(uri)
    folder = database_path(uri).parent / "mlartifacts"
    return [
        *(sys.executable, "-m", "mlflow", "ui"),
        *("--backend-store-uri", uri),
        *("--artifacts-destination", folder.as_uri()),
        *("--host", HOST, "--port", str(port), "--workers", "1"),
    ]


def link(uri: str, run_id: str, *, port: int = PORT) -> str:
    """The address of a run's page: on the server, or as `heliostat ui` serves it."""
    base = uri.rstrip("/") if uri.startswith(("http://", "https://")) else f"http://{HOST}:{port}"
    return f"{base}/#/runs/{run_id}"
