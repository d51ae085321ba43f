"""A tracking server that starts late, dies, comes back, and has been told some things already."""

import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import mlflow
import pytest

from heliostat.tracking import quiet
from heliostat.tracking.replay import replay
from heliostat.tracking.tracker import Tracker

quiet.silence()


class Server:
    """`mlflow server` on a free port of this machine, to be started and killed at will."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._folder = folder

    def start(self) -> None:
        store = f"sqlite:///{self._folder}/server.db"
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", store, "--artifacts-destination", f"{self._folder}/files"]
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env=quiet.environment(), stdout=log, stderr=log, start_new_session=True, cwd=self._folder
            )
        deadline = time.monotonic() + 300
        while not self._answers():
            assert time.monotonic() < deadline, (self._folder / "server.log").read_text()
            time.sleep(0.2)

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=1) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


def runs(uri, experiment, filter_string=""):
    client = mlflow.MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    return client.search_runs([found.experiment_id], filter_string, max_results=1000)


def steps(uri, run, name):
    history = mlflow.MlflowClient(uri).get_metric_history(run.info.run_id, name)
    return [(metric.step, metric.value) for metric in sorted(history, key=lambda metric: metric.step)]


def test_a_server_has_the_tree_its_values_and_its_files(server, tmp_path):
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "loss.svg").write_text("<svg/>")
    tracking = Tracker(server.uri, experiment="tree", spool=tmp_path / "spool")
    tracking.start_run("p", name="mnist", params={"epochs": 3, "long": "x" * 9000})
    tracking.start_run("p/0", name="trial 0", parent="p")
    for step in range(1500):
        tracking.metrics("p/0", {"loss": float(step), "nan": math.nan}, step=step)
    tracking.metrics("p/0", {"inf": math.inf}, step=0)
    tracking.text("p", "hello", "notes/hello.txt")
    tracking.artifact("p", tmp_path / "plots", "report")
    tracking.end_run("p/0", status="FAILED")
    tracking.end_run("p", status="FINISHED")
    pipeline_id = tracking.run_id("p", 60)
    assert tracking.close() == 0

    (trial,) = runs(server.uri, "tree", f"tags.mlflow.parentRunId = '{pipeline_id}' and metrics.loss = 1499")
    assert (trial.info.run_name, trial.info.status) == ("trial 0", "FAILED")
    assert steps(server.uri, trial, "loss") == [(step, float(step)) for step in range(1500)]
    assert math.isnan(trial.data.metrics["nan"])
    assert trial.data.metrics["inf"] > 1e308
    client = mlflow.MlflowClient(server.uri)
    assert client.get_run(pipeline_id).data.params["epochs"] == "3"
    assert [file.path for file in client.list_artifacts(pipeline_id, "report/plots")] == ["report/plots/loss.svg"]
    assert [file.path for file in client.list_artifacts(pipeline_id, "notes")] == ["notes/hello.txt"]


def test_a_run_is_found_again_by_its_key_when_nothing_is_known_here(server, tmp_path):
    for spool, epochs in ("one", 3), ("two", 5):
        tracking = Tracker(server.uri, experiment="again", spool=tmp_path / spool)
        tracking.start_run("p/it's", name="mnist", params={"epochs": epochs})
        for step in range(1, epochs + 1):
            tracking.metrics("p/it's", {"loss": step + epochs / 10}, step=step)
        tracking.end_run("p/it's", status="FINISHED")
        assert tracking.close() == 0
    (run,) = runs(server.uri, "again")
    assert run.data.params["epochs"] == "3"
    assert steps(server.uri, run, "loss") == [(1, 1.3), (2, 2.3), (3, 3.3), (4, 4.5), (5, 5.5)]


def test_ending_a_tree_ends_what_still_runs_of_it_and_nothing_else(server, tmp_path):
    tracking = Tracker(server.uri, experiment="ended", spool=tmp_path / "spool")
    for key in ("p_1", "p_1/s", "p_1/s/ended", "p_10", "pa1/s"):
        tracking.start_run(key, name=key)
    tracking.end_run("p_1/s/ended", status="FAILED")
    tracking.end_tree("p_1", status="KILLED")
    assert tracking.close() == 0
    assert {run.info.run_name: run.info.status for run in runs(server.uri, "ended")} == {
        **dict.fromkeys(("p_1", "p_1/s"), "KILLED"),
        "p_1/s/ended": "FAILED",
        **dict.fromkeys(("p_10", "pa1/s"), "RUNNING"),
    }
    assert all((run.info.end_time is None) == (run.info.status == "RUNNING") for run in runs(server.uri, "ended"))


def test_a_run_that_goes_on_forgets_its_error(server, tmp_path):
    settings = {"experiment": "mended", "spool": tmp_path / "spool"}
    for attempt in ("fails", "succeeds"):
        tracker = Tracker(server.uri, **settings)
        tracker.start_run("p", name="p")
        if attempt == "fails":
            tracker.error("p", "ValueError: no\nwhere")
        tracker.end_run("p", status="FAILED" if attempt == "fails" else "FINISHED", seconds=7.5)
        assert tracker.close() == 0
        (run,) = runs(server.uri, "mended")
        files = [file.path for file in mlflow.MlflowClient(server.uri).list_artifacts(run.info.run_id)]
        expected = ("ValueError: no", ["error.txt"]) if attempt == "fails" else (None, [])
        assert (run.data.tags.get("heliostat.error"), files) == expected
        assert ("mlflow.note.content" in run.data.tags) == (attempt == "fails")
        assert run.info.end_time - run.info.start_time == 7500  # the work, whenever it was


def test_what_the_server_refuses_does_not_hold_up_the_rest(server, tmp_path, caplog):
    tracking = Tracker(server.uri, experiment="refused", spool=tmp_path / "spool")
    tracking.metrics("never started", {"loss": 1.0}, step=1)
    tracking.start_run("p", name="mnist")
    tracking.metrics("p", {"loss": 1.0}, step=1)
    assert tracking.close() == 0
    assert runs(server.uri, "refused")[0].data.metrics == {"loss": 1.0}
    assert "not tracked: metrics of never started" in caplog.text


def test_close_does_not_wait_for_a_server_that_never_answers(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        uri = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        tracking = Tracker(uri, experiment="deaf", spool=tmp_path / "spool")
        tracking.start_run("p", name="mnist")
        assert tracking.close(timeout_s=1.0) == 1


def test_a_server_started_late_and_killed_in_the_middle_gets_everything_once(tmp_path):
    server = Server(tmp_path)
    tracking = Tracker(server.uri, experiment="late", spool=tmp_path / "spool")
    tracking.start_run("p", name="mnist")
    tracking.metrics("p", {"loss": 1.0}, step=1)
    assert tracking.run_id("p", 5) is None

    server.start()
    assert tracking.run_id("p", 60)
    tracking.metrics("p", {"loss": 2.0}, step=2)
    server.kill()
    for step in range(3, 50):
        tracking.metrics("p", {"loss": float(step)}, step=step)
        time.sleep(0.02)
    tracking.end_run("p", status="FINISHED")
    began = time.monotonic()
    left = tracking.close()
    assert left >= 48
    assert time.monotonic() - began < 60

    assert replay(tmp_path / "spool").waiting == left
    server.start()
    try:
        assert replay(tmp_path / "spool", "http://127.0.0.1:1").delivered == 0
        assert replay(tmp_path / "spool").delivered == left
        (run,) = runs(server.uri, "late")
        assert run.info.status == "FINISHED"
        assert steps(server.uri, run, "loss") == [(step, float(step)) for step in range(1, 50)]
        assert list((tmp_path / "spool").iterdir()) == []
    finally:
        server.kill()
