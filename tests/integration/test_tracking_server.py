"""A tracking server of MLflow's own: up, and down from the start."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch

import heliostat as public
from heliostat.tracking import quiet


class Server:
    """`mlflow server` on a port of its own, which is free until it is started."""

    def __init__(self, folder, eventually):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{port}"
        self._folder, self._eventually = folder, eventually
        self._process = None

    def start(self):
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            self.uri.rpartition(":")[2],
        ]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self._folder}/server.db"]
        command += ["--artifacts-destination", f"{self._folder}/files"]
        with open(self._folder / "log", "wb") as log:
            self._process = subprocess.Popen(
                command, env=quiet.environment(), stdout=log, stderr=log, cwd=self._folder, start_new_session=True
            )
        self._eventually(self._answers, "the server does not answer", unless=lambda: self._process.poll() is not None)

    def _answers(self):
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=1) as answer:
                return answer.status == 200
        except OSError:
            return False

    def stop(self):
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory, eventually):
    server = Server(tmp_path_factory.mktemp("server"), eventually)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def away(server, tmp_path_factory, toy_in, heliostat_in):
    """A run whose server is down from the start to the end: the toy, and the process."""
    toy = toy_in(tmp_path_factory.mktemp("tracking") / "toy")
    document = toy.document
    document["stages"][0]["config"]["trials"] = 2
    document["stages"] = [
        *document["stages"][:2],
        {"name": "best", "uses": "select", "inputs": {"baseline": "train", "candidates": "train"}},
    ]
    document["tracking"] = {"uri": server.uri, "experiment": "remote"}
    toy.write(document)
    return toy, heliostat_in(toy.folder)("run", "toy.yaml", timeout=500)


@pytest.fixture(scope="module")
def delivered(away, server, heliostat_in):
    """The server after it came up and `heliostat sync`: MLflow's client and its runs by name."""
    toy, _ = away
    before = heliostat_in(toy.folder)("sync")
    assert before.returncode == 1, before.stdout
    assert f"{server.uri} is away" in before.stderr
    server.start()
    done = heliostat_in(toy.folder)("sync")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 still waiting" in done.stdout
    return runs_of(server)


def runs_of(server):
    quiet.silence()
    import mlflow

    mlflow.set_tracking_uri(server.uri)
    client = mlflow.MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("remote")
    found = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    return client, {run.info.run_name: run for run in found}


def test_a_run_goes_on_without_its_server_and_says_so(away, server):
    toy, done = away
    assert done.returncode == 0, done.stderr
    assert "heliostat sync" in done.stderr
    assert "tracking events wait in" in done.stderr
    assert "chosen: train" in done.stdout
    assert list((toy.folder / ".heliostat" / "spool").glob("*.jsonl"))


def test_sync_delivers_the_whole_tree(away, delivered):
    client, runs = delivered
    assert runs.keys() == {"toy", "search", "0001", "0002", "train", "best"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    parents = {name: run.data.tags.get("mlflow.parentRunId") for name, run in runs.items()}
    assert parents["0002"] == runs["search"].info.run_id
    assert parents["train"] == parents["search"] == runs["toy"].info.run_id
    steps = [metric.step for metric in client.get_metric_history(runs["train"].info.run_id, "val_loss")]
    assert [step for step in sorted(steps) if 1 <= step <= 3] == [1, 2, 3]


def test_the_model_is_on_the_server_too(away, delivered):
    import mlflow

    toy, _ = away
    _, runs = delivered
    (folder,) = (toy.folder / ".heliostat" / "toy" / "best").iterdir()
    batch = torch.zeros(4, 8)
    loaded = mlflow.pyfunc.load_model(f"runs:/{runs['best'].info.run_id}/model")
    predicted = torch.as_tensor(loaded.predict(batch.numpy()))
    torch.testing.assert_close(predicted, public.load_model(folder, trust_code=True)(batch), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_run_reports_to_a_server_that_is_up(away, delivered, server, heliostat):
    toy, _ = away
    done = heliostat("run", toy.file, "--set", "stages.train.config.epochs=4", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["tracking"]["uri"] == server.uri
    assert "tracking events wait" not in done.stderr
    client, _ = runs_of(server)
    tree = client.search_runs([client.get_experiment_by_name("remote").experiment_id])
    top = document["tracking"]["run_id"]
    below = {run.info.run_name for run in tree if run.data.tags.get("mlflow.parentRunId") == top}
    assert below == {"train", "best"}  # the search was reused
    ids = {run.info.run_name: run.info.run_id for run in tree if run.data.tags.get("mlflow.parentRunId") == top}
    for node in document["nodes"][1:]:
        tracking = json.loads((Path(node["path"]) / "record.json").read_text())["tracking"]
        assert tracking["run_id"] == ids[node["name"]]  # also of `best`, which ends before the server has told it
