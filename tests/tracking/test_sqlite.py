"""The embedded store: what the tracker writes is what MLflow's own client reads."""

import logging
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import mlflow
import pytest

from heliostat.tracking.spool import Journal
from heliostat.tracking.tracker import Tracker


@pytest.fixture
def uri(tmp_path):
    return f"sqlite:///{tmp_path}/mlflow.db"


def tracker(uri, tmp_path, **changes):
    return Tracker(**{"uri": uri, "experiment": "digits", "spool": tmp_path / "spool", **changes})


def runs(uri, filter_string=""):
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("digits")
    return client.search_runs([experiment.experiment_id], filter_string, max_results=1000, order_by=["start_time"])


def steps(uri, run, name):
    history = mlflow.MlflowClient(uri).get_metric_history(run.info.run_id, name)
    return [(metric.step, metric.value) for metric in sorted(history, key=lambda metric: metric.step)]


def run_python(script, *arguments, **options):
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)], **options)


def test_ending_a_tree_ends_what_still_runs_of_it_and_nothing_else(uri, tmp_path):
    tracking = tracker(uri, tmp_path)
    for key in ("p_1", "p_1/s", "p_1/s/ended", "p_10", "pa1/s"):
        tracking.start_run(key, name=key)
    tracking.end_run("p_1/s/ended", status="FAILED")
    tracking.end_tree("p_1", status="KILLED")
    assert tracking.close() == 0
    assert {run.info.run_name: run.info.status for run in runs(uri)} == {
        **dict.fromkeys(("p_1", "p_1/s"), "KILLED"),
        "p_1/s/ended": "FAILED",
        **dict.fromkeys(("p_10", "pa1/s"), "RUNNING"),
    }
    assert all((run.info.end_time is None) == (run.info.status == "RUNNING") for run in runs(uri))


def test_the_client_sees_one_tree_with_parameters_metrics_and_states(uri, tmp_path):
    tracking = tracker(uri, tmp_path)
    tracking.start_run("p", name="mnist", tags={"version.torch": "2.13"})
    tracking.start_run("s", name="search", parent="p")
    tracking.start_run("s/0", name="trial 0", parent="s", params={"optimizer": {"lr": 0.1}, "layers": [4, 8]})
    tracking.metrics("s/0", {"val_loss": 0.5, "val_accuracy": 0.8}, step=1)
    tracking.metrics("s/0", {"val_loss": 0.25}, step=2)
    tracking.end_run("s/0", status="KILLED")
    tracking.end_run("s", status="FAILED")
    tracking.end_run("p", status="FINISHED")
    pipeline_id = tracking.run_id("p", 60)
    assert tracking.close() == 0

    (trial,) = runs(uri, "metrics.val_loss < 0.3 and params.`optimizer.lr` = '0.1'")
    (stage,) = runs(uri, f"tags.mlflow.parentRunId = '{pipeline_id}'")
    assert trial.data.tags["mlflow.parentRunId"] == stage.info.run_id
    assert (stage.info.run_name, stage.info.status) == ("search", "FAILED")
    assert (trial.info.run_name, trial.info.status) == ("trial 0", "KILLED")
    assert trial.info.end_time >= trial.info.start_time
    assert trial.data.params == {"optimizer.lr": "0.1", "layers": "[4, 8]"}
    assert trial.data.metrics == {"val_loss": 0.25, "val_accuracy": 0.8}
    assert steps(uri, trial, "val_loss") == [(1, 0.5), (2, 0.25)]
    assert {"mlflow.user", "mlflow.source.name", "mlflow.source.type"} <= trial.data.tags.keys()


def test_the_same_keys_go_on_with_the_same_runs_and_log_no_step_twice(uri, tmp_path):
    for last_step in (2, 4):
        tracking = tracker(uri, tmp_path)
        tracking.start_run("p", name="mnist", params={"epochs": 4})
        for step in range(1, last_step + 1):
            tracking.metrics("p", {"loss": 1 / step + last_step}, step=step)
        tracking.end_run("p", status="FINISHED")
        assert tracking.close() == 0

    (run,) = runs(uri)
    assert steps(uri, run, "loss") == [(1, 3.0), (2, 2.5), (3, 1 / 3 + 4), (4, 4.25)]
    assert run.data.metrics["loss"] == 4.25
    assert list((tmp_path / "spool").iterdir()) == []


def test_nan_and_infinity_are_values_like_others(uri, tmp_path):
    tracking = tracker(uri, tmp_path)
    tracking.start_run("p", name="mnist")
    tracking.metrics("p", {"a": math.nan, "b": math.inf, "c": -math.inf}, step=1)
    assert tracking.close() == 0
    metrics = runs(uri)[0].data.metrics
    assert math.isnan(metrics["a"])
    assert metrics["b"] > 1e308
    assert metrics["c"] < -1e308


def test_names_and_values_that_mlflow_refuses_are_made_to_fit(uri, tmp_path):
    tracking = tracker(uri, tmp_path)
    tracking.start_run("p", name="prune[sparsity=0.5]", params={"long": "x" * 9000})
    tracking.metrics("p", {"prune[0.5]": 1.0}, step=1)
    tracking.metrics("p", {"bad": "no number"}, step=1)
    assert tracking.close() == 0
    (run,) = runs(uri)
    assert run.info.run_name == "prune[sparsity=0.5]"
    assert run.data.metrics == {"prune_0.5_": 1.0}
    assert len(run.data.params["long"]) == 6000
    assert run.data.params["long"].endswith("x … (cut)")


def test_artifacts_are_listed_and_read_by_the_client(uri, tmp_path):
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "loss.svg").write_text("<svg/>")
    (tmp_path / "mnist.yaml").write_text("name: mnist")
    tracking = tracker(uri, tmp_path)
    tracking.start_run("p", name="mnist")
    tracking.artifact("p", tmp_path / "mnist.yaml")
    tracking.artifact("p", tmp_path / "plots", "report")
    tracking.text("p", "hello", "notes/hello.txt")
    tracking.artifact("p", tmp_path / "gone")
    run_id = tracking.run_id("p", 60)
    assert tracking.close() == 0
    client = mlflow.MlflowClient(uri)
    assert {file.path for file in client.list_artifacts(run_id)} == {"mnist.yaml", "report", "notes"}
    assert [file.path for file in client.list_artifacts(run_id, "report/plots")] == ["report/plots/loss.svg"]
    assert Path(client.download_artifacts(run_id, "notes/hello.txt")).read_text() == "hello"
    assert (tmp_path / "mlartifacts" / run_id / "artifacts" / "mnist.yaml").exists()


TRACK_UNTIL_KILLED = """
    import sys, time
    from pathlib import Path
    from heliostat.tracking.tracker import Tracker

    tracking = Tracker(sys.argv[1], experiment="digits", spool=Path(sys.argv[2]))
    tracking.start_run("p", name="mnist")
    for step in range(1, int(sys.argv[3]) + 1):
        tracking.metrics("p", {"loss": 1.0 / step}, step=step)
        time.sleep(0.002)
    print("done", flush=True)
    time.sleep(float(sys.argv[4]))
"""


@pytest.mark.parametrize("delay_s", [0.0, 1.5], ids=["before delivery", "after delivery"])
def test_after_kill_9_the_same_keys_have_every_step_once(uri, tmp_path, delay_s):
    killed = run_python(TRACK_UNTIL_KILLED, uri, tmp_path / "spool", 300, 60, stdout=subprocess.PIPE, text=True)
    assert killed.stdout.readline() == "done\n"
    time.sleep(delay_s)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert list((tmp_path / "spool").glob("*.jsonl"))

    tracking = tracker(uri, tmp_path)
    tracking.start_run("p", name="mnist")
    for step in range(290, 401):
        tracking.metrics("p", {"loss": 1.0 / step}, step=step)
    tracking.end_run("p", status="FINISHED")
    assert tracking.close() == 0
    (run,) = runs(uri)
    assert steps(uri, run, "loss") == [(step, 1.0 / step) for step in range(1, 401)]
    assert list((tmp_path / "spool").iterdir()) == []


def test_what_was_told_in_the_instant_before_a_kill_is_not_lost(uri, tmp_path):
    script = """
        import os, signal, sys
        from pathlib import Path
        from heliostat.tracking.tracker import Tracker

        tracking = Tracker(sys.argv[1], experiment="digits", spool=Path(sys.argv[2]))
        tracking.start_run("p", name="mnist")
        tracking.metrics("p", {"loss": 1.0}, step=1)
        tracking.end_run("p", status="FINISHED")
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert run_python(script, uri, tmp_path / "spool").wait() == -signal.SIGKILL
    assert tracker(uri, tmp_path).close() == 0
    (run,) = runs(uri)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"loss": 1.0})


def test_two_processes_share_one_new_store(uri, tmp_path):
    script = """
        import sys
        from pathlib import Path
        from heliostat.tracking.tracker import Tracker

        tracking = Tracker(sys.argv[1], experiment="digits", spool=Path(sys.argv[2]))
        for trial in range(100):
            key = f"{sys.argv[3]}/{trial}"
            tracking.start_run(key, name=key)
            for step in range(5):
                tracking.metrics(key, {"loss": step}, step=step)
            tracking.end_run(key, status="FINISHED")
        sys.exit(tracking.close())
    """
    both = [run_python(script, uri, tmp_path / "spool", name) for name in "ab"]
    assert [process.wait() for process in both] == [0, 0]
    found = runs(uri, "attributes.status = 'FINISHED' and metrics.loss = 4")
    assert {run.info.run_name for run in found} == {f"{name}/{trial}" for name in "ab" for trial in range(100)}


def test_a_spool_that_cannot_be_made_is_said_once_and_costs_no_event(uri, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        tracking = tracker(uri, tmp_path, spool=tmp_path / "file" / "spool")
        tracking.start_run("p", name="mnist")
        tracking.metrics("p", {"loss": 1.0}, step=1)
        assert tracking.close() == 0
    assert runs(uri)[0].data.metrics == {"loss": 1.0}
    assert len(caplog.messages) == 1
    assert "goes on without its spool" in caplog.text


def test_a_full_disk_is_said_once_and_costs_no_event(uri, tmp_path, caplog, monkeypatch):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")

    def on_a_full_disk(folder, target):
        folder.mkdir()
        (folder / "1.jsonl").touch()
        return Journal(folder / "1.jsonl", full.open("wb", buffering=0), target, 0)

    monkeypatch.setattr(Journal, "create", on_a_full_disk)
    with caplog.at_level(logging.WARNING):
        tracking = tracker(uri, tmp_path)
        tracking.start_run("p", name="mnist")
        assert tracking.run_id("p", 60)
        tracking.metrics("p", {"loss": 1.0}, step=1)
        assert tracking.close() == 0
    assert runs(uri)[0].data.metrics == {"loss": 1.0}
    assert [message for message in caplog.messages if "is full" in message] == caplog.messages
    assert len(caplog.messages) == 1


def test_a_store_that_cannot_be_made_keeps_events_for_the_next_tracker(tmp_path):
    (tmp_path / "store").write_text("in the way")
    uri = f"sqlite:///{tmp_path}/store/mlflow.db"
    tracking = tracker(uri, tmp_path)
    tracking.start_run("p", name="mnist")
    tracking.metrics("p", {"loss": 1.0}, step=1)
    run_id = tracking.run_id("p", 0)  # it follows from the key
    assert (tracking.close(), tracking.lost) == (2, 0)

    (tmp_path / "store").unlink()
    assert tracker(uri, tmp_path).close() == 0
    (run,) = runs(uri)
    assert (run.info.run_id, run.data.metrics) == (run_id, {"loss": 1.0})


def test_a_run_deleted_in_mlflow_comes_back_when_it_is_started_again(uri, tmp_path):
    for _ in range(2):
        tracking = tracker(uri, tmp_path)
        tracking.start_run("p", name="mnist")
        run_id = tracking.run_id("p", 60)
        assert tracking.close() == 0
        assert [run.info.run_id for run in runs(uri)] == [run_id]
        mlflow.MlflowClient(uri).delete_run(run_id)


def test_an_experiment_deleted_in_mlflow_is_named_with_the_way_to_restore_it(uri, tmp_path, caplog):
    assert tracker_with_one_run(uri, tmp_path).close() == 0
    client = mlflow.MlflowClient(uri)
    client.delete_experiment(client.get_experiment_by_name("digits").experiment_id)
    assert tracker_with_one_run(uri, tmp_path).close() == 1
    assert "mlflow experiments restore --experiment-id 1" in caplog.text


def tracker_with_one_run(uri, tmp_path):
    tracking = tracker(uri, tmp_path)
    tracking.start_run("p", name="mnist")
    return tracking


def test_the_embedded_store_needs_no_mlflow_in_this_process_and_prints_nothing(uri, tmp_path):
    script = (
        TRACK_UNTIL_KILLED
        + """
    assert tracking.close() == 0
    assert "mlflow" not in sys.modules
    """
    )
    process = run_python(
        script, uri, tmp_path / "spool", 3, 0, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.communicate() == ("done\n", "")
    assert process.returncode == 0
