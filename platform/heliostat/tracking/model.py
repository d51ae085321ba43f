"""A Heliostat model folder as an MLflow model, attached to a run: `mlflow.pyfunc.load_model("runs:/RUN_ID/model")`.

This is done in a process of its own, for it imports all of MLflow, and MLflow's state is global to a process. Nothing
is pickled and the model is not run: MLflow stores the script `pyfunc_model.py` and the folder, is told the signature
and the requirements, and so has no reason to find them out by loading the model.
"""

import base64
import io
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from heliostat.tracking import quiet
from heliostat.tracking.context import requirements
from heliostat.tracking.events import MODEL_TAG
from heliostat.tracking.writer import UnavailableError

NAME = "model"
TRY_AGAIN = 75
"""The exit status `EX_TEMPFAIL` of sysexits.h: the store is away."""

_log = logging.getLogger(__name__)


def log_in_own_process(uri: str, run_id: str, model: Mapping[str, str]) -> None:
    """Log the model that an event of the kind `model` tells of, as `events.cleaned` writes it, once.

    Raises `UnavailableError`.
    """
    order = json.dumps({"uri": uri, "run_id": run_id, **model})
    done = subprocess.run(
        [sys.executable, "-m", "heliostat.tracking.model"],
        input=order,
        capture_output=True,
        text=True,
        env=quiet.environment(),
        start_new_session=True,  # Ctrl-C in the terminal is for this process, which then waits for that one
    )
    last_words = done.stderr.strip()[-2000:]
    if done.returncode == TRY_AGAIN or done.returncode < 0:  # or killed, for want of memory it may be
        raise UnavailableError(last_words)
    if done.returncode:
        _log.warning("not tracked: the model %s: %s", model["folder"], last_words)


def _log_model(uri: str, run_id: str, folder: str, example: str, outputs: str | None = None) -> None:
    """`outputs` are missing in what an earlier version spooled."""
    quiet.silence()
    import mlflow
    import numpy as np
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient()
    run = client.get_run(run_id)
    if MODEL_TAG in run.data.tags:
        return

    def array(text: str) -> Any:
        return np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)

    def schema(batch: Any) -> Schema:
        return Schema([TensorSpec(batch.dtype, (-1, *batch.shape[1:]))])

    batch = array(example)
    model = client.create_logged_model(run.info.experiment_id, name=NAME, source_run_id=run_id, model_type="heliostat")
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / NAME
        mlflow.pyfunc.save_model(
            str(made),
            mlflow_model=Model(artifact_path=model.artifact_location, model_uuid=model.model_id, run_id=run_id),
            python_model=str(Path(__file__).with_name("pyfunc_model.py")),
            artifacts={"model": folder},
            signature=ModelSignature(inputs=schema(batch), outputs=schema(array(outputs)) if outputs else None),
            input_example=batch,
            pip_requirements=requirements(Path(folder)),
        )
        client.log_model_artifacts(model.model_id, str(made))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    client.set_tag(run_id, MODEL_TAG, f"models:/{model.model_id}")  # last: until then it is logged anew


def _main() -> None:
    from heliostat.tracking.client import errors_of_the_store

    try:
        with errors_of_the_store():
            _log_model(**json.load(sys.stdin))
    except UnavailableError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(TRY_AGAIN)


if __name__ == "__main__":
    _main()
