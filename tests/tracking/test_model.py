"""The chosen model as an MLflow model."""

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch

import heliostat
from heliostat.tracking import quiet
from heliostat.tracking.tracker import Tracker

quiet.silence()


def load_toy(folder, *, trust_code):
    """A model folder with one number in it: the model multiplies each pixel's row sum by that number."""
    factor = float((folder / "factor.txt").read_text())
    return lambda batch: batch.flatten(1).sum(1, keepdim=True) * factor


@pytest.fixture
def logged(tmp_path, monkeypatch):
    """Logs a toy with that input example and gives the client and the run id."""
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "factor.txt").write_text("2.0")
    monkeypatch.setattr(heliostat, "load_model", load_toy, raising=False)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)

    def log(example):
        tracking = Tracker(uri, experiment="digits", spool=tmp_path / "spool")
        tracking.start_run("p", name="mnist")
        tracking.log_model("p", tmp_path / "toy", input_example=example, output_example=np.ones((2, 1), np.float32))
        tracking.end_run("p", status="FINISHED")
        run_id = tracking.run_id("p", 60)
        assert tracking.close() == 0
        return mlflow.MlflowClient(), run_id

    yield log
    mlflow.set_tracking_uri(before)


def test_pyfunc_loads_the_model_of_a_run_and_predicts(logged, tmp_path):
    client, run_id = logged(np.ones((2, 1, 3, 3), np.float32))
    loaded = mlflow.pyfunc.load_model(f"runs:/{run_id}/model")
    batch = np.arange(36, dtype=np.float32).reshape(4, 1, 3, 3)
    np.testing.assert_allclose(loaded.predict(batch), batch.reshape(4, 9).sum(1, keepdims=True) * 2)

    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    (output,) = run.outputs.model_outputs
    assert run.data.tags["heliostat.model_uri"] == f"models:/{output.model_id}"
    assert mlflow.pyfunc.load_model(f"models:/{output.model_id}").predict(batch[:1]).shape == (1, 1)
    (answer,) = loaded.metadata.signature.outputs
    assert (answer.type, answer.shape) == (np.float32, (-1, 1))
    assert not list(tmp_path.rglob("*.pkl"))
    assert {line.partition("==")[0] for line in requirements_of(output.model_id)} >= {"heliostat", "torch"}


def requirements_of(model_id):
    folder = mlflow.artifacts.download_artifacts(f"models:/{model_id}")
    with open(f"{folder}/requirements.txt") as file:
        return file.read().splitlines()


def test_a_model_of_rows_takes_a_data_frame_too(logged):
    _, run_id = logged(np.ones((2, 3), np.float32))
    loaded = mlflow.pyfunc.load_model(f"runs:/{run_id}/model")
    frame = pd.DataFrame(np.ones((5, 3), np.float32))
    np.testing.assert_allclose(loaded.predict(frame), np.full((5, 1), 6.0))
    assert torch.is_grad_enabled()


def test_a_model_is_logged_once_however_often_it_is_told(logged):
    logged(np.ones((2, 3), np.float32))
    client, run_id = logged(np.ones((2, 3), np.float32))
    experiment = client.get_experiment_by_name("digits")
    assert len(client.search_logged_models([experiment.experiment_id])) == 1
    assert len(client.get_run(run_id).outputs.model_outputs) == 1
