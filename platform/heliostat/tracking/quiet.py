"""MLflow without its noise: nothing on the terminal, no telemetry, and a server that is away is noticed in seconds.

`MlflowClient` reads its settings from the environment only. What the user has set there already stands.
"""

import logging
import os

SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_CONFIGURE_LOGGING": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # a server's worker processes for jobs that nobody here submits
}


def environment() -> dict[str, str]:
    """The environment for a process that runs MLflow."""
    return {**SETTINGS, **os.environ}


def silence() -> None:
    """Make this process such a one. To be called before the first `import mlflow`.

    The loggers still hand their records up to the root logger; the null handlers only keep Python's handler of last
    resort from printing them where nobody has configured logging.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow", "alembic", "urllib3"):
        logging.getLogger(name).addHandler(logging.NullHandler())
