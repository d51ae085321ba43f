"""MLflow's own pages over an embedded store."""

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest

from heliostat.errors import HeliostatError
from heliostat.tracking import quiet, ui
from heliostat.tracking.tracker import Tracker


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def get(url, *, timeout_s=300):
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return answer.read().decode()
        except (urllib.error.URLError, OSError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def test_the_pages_show_runs_and_files_of_an_embedded_store(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracking = Tracker(uri, experiment="digits", spool=tmp_path / "spool")
    tracking.start_run("p", name="mnist")
    tracking.text("p", "hello", "hello.txt")
    run_id = tracking.run_id("p", 60)
    assert tracking.close() == 0

    port = free_port()
    with (tmp_path / "ui.log").open("wb") as log:
        pages = subprocess.Popen(
            ui.command(uri, port=port), env=quiet.environment(), stdout=log, stderr=log, cwd=tmp_path
        )
    try:
        base = f"http://127.0.0.1:{port}"
        run = json.loads(get(f"{base}/api/2.0/mlflow/runs/get?run_id={run_id}"))["run"]
        assert run["info"]["run_name"] == "mnist"
        assert get(f"{base}/get-artifact?run_id={run_id}&path=hello.txt") == "hello"
    finally:
        pages.terminate()
        pages.wait()


def test_a_run_has_an_address_on_either_kind_of_store():
    assert ui.link("http://tracking:5000/", "abc") == "http://tracking:5000/#/runs/abc"
    assert ui.link("sqlite:///mlflow.db", "abc", port=5001) == "http://127.0.0.1:5001/#/runs/abc"


def test_a_server_needs_no_pages_of_ours():
    with pytest.raises(HeliostatError, match="open http://tracking:5000"):
        ui.command("http://tracking:5000")
