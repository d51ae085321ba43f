"""What a run tells MLflow of runs before it: which it goes on with, which it ends, and what it mends."""

import time
from dataclasses import replace

import mlflow
import pytest

from heliostat.core.artifact import Record, read_record, write_record
from heliostat.core.outcome import Unwatched, outcome_of
from heliostat.history import History, run_key
from heliostat.report import runs
from heliostat.runner import load_pipeline, plan
from heliostat.tracking import quiet

quiet.silence()


@pytest.fixture
def planned(toy):
    document = toy.document
    document["stages"] = document["stages"][:2]
    return plan(load_pipeline(toy.write(document)))


def tracked(planned):
    """The runs in MLflow by name and by key."""
    client = mlflow.MlflowClient(planned.pipeline.tracking_uri)
    experiment = client.get_experiment_by_name(planned.pipeline.experiment)
    found = client.search_runs([experiment.experiment_id])
    return {run.data.tags["heliostat.key"]: run for run in found}


def nothing_follows():
    """What a stage calls when it is nearly over, in a pipeline that has no stage after it."""


def errors_of(planned, run):
    """The error of a run as a tag, and the files of that name."""
    files = mlflow.MlflowClient(planned.pipeline.tracking_uri).list_artifacts(run.info.run_id)
    return run.data.tags.get("heliostat.error"), [file.path for file in files if file.path == "error.txt"]


def record_of(node, history, **changes):
    identity = {"pipeline": "toy", "node": node.name, "stage": node.stage, "uses": node.uses}
    fields = {"kind": "model", "identity": {}, "fingerprint": node.fingerprint, "tracking": history.ids(node)}
    return Record(**identity, **fields | changes)


def test_a_run_goes_on_with_the_newest_killed_one_of_its_plan_and_a_forced_one_is_new(planned):
    key = f"toy/{planned.fingerprint}"
    assert run_key(planned, []) == run_key(planned, ["toy/another", "toy/another@2026"]) == key
    assert run_key(planned, ["toy/another", f"{key}@2026", key]) == f"{key}@2026"
    assert run_key(planned, [key, f"{key}@2026"]) == key
    forced = plan(planned.pipeline, force=["train"])
    assert run_key(forced, [key, f"{key}@2026"]).startswith(f"{key}@")
    assert run_key(forced, [f"{key}@2026"]) != f"{key}@2026"


def test_runs_cut_off_are_those_since_one_that_ended(tmp_path):
    for number, status in enumerate(["unfinished", "done", "unfinished", "unfinished"]):
        runs.write_run(tmp_path, f"toy-{number}", {"pipeline": "toy", "status": status})
    runs.write_run(tmp_path, "other-9", {"pipeline": "other", "status": "done"})
    assert {run["run"] for run in runs.cut_off(tmp_path, "toy")} == {"toy-2", "toy-3"}
    assert runs.cut_off(tmp_path, "other") == []


def test_a_run_ends_what_killed_ones_left_open_and_goes_on_with_its_own(planned):
    node = planned.node("search")
    for key in ("toy/0@killed", "toy/mine"):
        with History.open(planned, key, print) as killed:
            killed.started(node, {})
            killed.reporter(node, None, when_nearly_over=nothing_follows).trial_started("0001", {})
    with History.open(planned, "toy/mine", print, ["toy/mine", "toy/0@killed"]):
        pass
    below = ("", f"/{node.fingerprint}", f"/{node.fingerprint}/0001")
    status = {key: run.info.status for key, run in tracked(planned).items()}
    assert status == {f"toy/0@killed{end}": "KILLED" for end in below} | {f"toy/mine{end}": "RUNNING" for end in below}


def test_a_model_that_could_not_be_measured_and_then_was_has_finished_in_the_run_that_made_it(planned):
    node = planned.node("train")
    with History.open(planned, "toy/first", print) as first:
        first.started(node, {})
        record = record_of(node, first, metrics={"val_loss": 0.5})
        first.finished(node, record)
        first.failed(node, "its speed cannot be measured: RuntimeError", seconds=1.0, made=record)
    key = f"toy/first/{node.fingerprint}"
    assert tracked(planned)[key].info.status == "FAILED"
    with History.open(planned, "toy/second", print) as second:
        second.measured(node, record, {"latency_ms": 0.25})
    run = tracked(planned)[key]
    assert (run.info.status, run.data.metrics) == (
        "FINISHED",
        {"val_loss": 0.5, "best_val_loss": 0.5, "latency_ms": 0.25},
    )
    assert errors_of(planned, run) == (None, [])


def test_a_node_that_failed_and_then_succeeded_carries_no_error(planned):
    node = planned.node("train")
    with History.open(planned, "toy/mine", print) as first:
        first.started(node, {})
        first.failed(node, "ValueError: no\n  File ...", seconds=1.0)
    key = f"toy/mine/{node.fingerprint}"
    assert errors_of(planned, tracked(planned)[key]) == ("ValueError: no", ["error.txt"])
    with History.open(planned, "toy/mine", print) as second:
        second.started(node, {})
        second.finished(node, record_of(node, second))
    run = tracked(planned)[key]
    assert run.info.status == "FINISHED"
    assert errors_of(planned, run) == (None, [])


def test_a_model_of_an_old_store_whose_record_does_not_name_its_run_is_told_of_in_this_one(planned):
    node = planned.node("train")
    with History.open(planned, "toy/mine", print) as history:
        record = record_of(node, history, metrics={"val_loss": 0.5}, tracking={"run_id": "of another time"})
        history.failed(node, "its speed cannot be measured", seconds=1.0, made=record)
        history.measured(node, replace(record, metrics={"val_loss": 0.5, "latency_ms": 0.25}), {"latency_ms": 0.25})
    run = tracked(planned)[f"toy/mine/{node.fingerprint}"]
    assert (run.info.status, run.data.metrics) == (
        "FINISHED",
        {"val_loss": 0.5, "best_val_loss": 0.5, "latency_ms": 0.25},
    )
    assert (run.info.run_name, errors_of(planned, run)) == ("train", (None, []))


@pytest.mark.parametrize(("status", "tag"), [("failed", "heliostat.error"), ("stopped", "heliostat.reason")])
def test_why_a_trial_ended_is_an_error_only_if_it_failed(planned, status, tag):
    node = planned.node("search")
    with History.open(planned, "toy/mine", print) as history:
        reporter = history.reporter(node, None, when_nearly_over=nothing_follows)
        reporter.trial_started("0001", {})
        reporter.trial_ended("0001", status, metrics={}, reason="why it did")
    run = tracked(planned)[f"toy/mine/{node.fingerprint}/0001"]
    assert {name for name, value in run.data.tags.items() if value == "why it did"} == {tag}
    assert run.info.status == ("FAILED" if status == "failed" else "KILLED")
    assert run.data.tags["mlflow.note.content"].startswith({"failed": "**Failed.**", "stopped": "**Stopped**"}[status])


def points(planned, run, name):
    history = mlflow.MlflowClient(planned.pipeline.tracking_uri).get_metric_history(run.info.run_id, name)
    return {point.step: point.value for point in history}


def test_what_is_known_of_a_trained_model_adds_no_point_to_the_curves_of_its_epochs(planned):
    node = planned.node("train")
    curve = [{"val_loss": 0.9}, {"val_loss": 0.5}, {"val_loss": 0.7}]
    with History.open(planned, "toy/mine", print) as history:
        reporter = history.reporter(node, Unwatched(), when_nearly_over=nothing_follows)
        reporter.began()
        for epoch, row in enumerate(curve, 1):
            reporter.metrics(row, step=epoch)
        details = {"history": curve, "best_epoch": 2}
        record = record_of(node, history, metrics={"val_loss": 0.5, "test_loss": 0.6}, details=details)
        history.finished(node, record)
        history.measured(node, record, {"latency_ms": 0.25})
    run = tracked(planned)[f"toy/mine/{node.fingerprint}"]
    assert points(planned, run, "val_loss") == {1: 0.9, 2: 0.5, 3: 0.7}
    for name, value in {"best_val_loss": 0.5, "test_loss": 0.6, "latency_ms": 0.25}.items():
        assert points(planned, run, name) == {2: value}


def test_the_best_epoch_of_a_trial_is_told_beside_its_curve(planned):
    node = planned.node("search")
    with History.open(planned, "toy/mine", print) as history:
        reporter = history.reporter(node, Unwatched(), when_nearly_over=nothing_follows)
        reporter.trial_started("0001", {})
        for epoch, loss in enumerate([0.5, 0.7], 1):
            reporter.metrics({"val_loss": loss}, step=epoch, trial="0001")
        reporter.trial_ended("0001", "done", metrics={"val_loss": 0.5}, best_epoch=1, seconds=3.0)
    run = tracked(planned)[f"toy/mine/{node.fingerprint}/0001"]
    assert points(planned, run, "val_loss") == {1: 0.5, 2: 0.7}
    assert points(planned, run, "best_val_loss") == {1: 0.5}
    assert run.info.end_time - run.info.start_time == 3000


def test_the_duration_of_a_run_in_mlflow_is_that_of_the_work_however_long_its_model_waits_to_be_measured(planned):
    node = planned.node("train")
    with History.open(planned, "toy/first", print) as first:
        first.started(node, {})
        record = record_of(node, first, seconds=7.5)
        first.finished(node, record)
    with History.open(planned, "toy/second", print) as second:
        second.measured(node, record, {"latency_ms": 0.25})
    run = tracked(planned)[f"toy/first/{node.fingerprint}"]
    assert run.info.end_time - run.info.start_time == 7500


def test_a_stage_starts_in_mlflow_and_on_the_terminal_when_it_has_what_it_waited_for(planned):
    node, seen = planned.node("train"), []

    class View(Unwatched):
        def started(self, node):
            seen.append(node.name)

    with History.open(planned, "toy/mine", print) as history:
        reporter = history.reporter(node, View(), when_nearly_over=nothing_follows)
        reporter.params = {"optimizer": {"lr": 0.007}}
        assert (reporter.seconds, seen) == (0.0, [])
        reporter.began()
        reporter.began()
    assert seen == ["train"]
    assert tracked(planned)[f"toy/mine/{node.fingerprint}"].data.params == {"optimizer.lr": "0.007"}


def test_a_run_with_failures_says_which_nodes_failed_and_why_the_others_were_skipped_until_it_goes_on(planned):
    search, train = planned.nodes
    outcomes = [
        outcome_of(search, "failed", error="ValueError: no\n  File ..."),
        outcome_of(train, "skipped", error="needs search"),
    ]
    with History.open(planned, "toy/mine", print) as history:
        history.end("failed", None, outcomes)
    root = tracked(planned)["toy/mine"]
    assert errors_of(planned, root) == ("search failed: ValueError: no", ["error.txt"])
    assert "search failed: ValueError: no\ntrain skipped: needs search" in root.data.tags["mlflow.note.content"]
    with History.open(planned, "toy/mine", print) as again:
        again.end("done", None)
    root = tracked(planned)["toy/mine"]
    assert (root.info.status, errors_of(planned, root)) == ("FINISHED", (None, []))
    assert "mlflow.note.content" not in root.data.tags


def test_a_run_id_that_came_late_is_put_into_the_record_when_the_run_ends(planned):
    node, other = planned.node("train"), planned.node("search")
    with History.open(planned, "toy/mine", print) as history:
        early = {name: value for name, value in history.ids(node).items() if not name.endswith("run_id")}
        for one, tracking in (node, early), (other, {**early, "key": "toy/another/run"}):
            one.folder.mkdir(parents=True)
            write_record(one.folder, record_of(one, history, tracking=tracking))
    run = tracked(planned)
    record = read_record(node.folder)
    assert record == replace(record, tracking={**early, **history.ids(node)})
    assert record.tracking["pipeline_run_id"] == run["toy/mine"].info.run_id
    assert "run_id" not in read_record(other.folder).tracking


def test_the_seconds_of_a_stage_that_resumes_are_those_of_all_its_attempts(planned):
    node = planned.node("train")
    node.folder.parent.mkdir(parents=True)
    with History.open(planned, "toy/mine", print) as history:

        def attempt():
            return history.reporter(node, Unwatched(), when_nearly_over=nothing_follows)

        killed = attempt()
        killed.began(time.time() - 100)  # it waited until now
        assert killed.seconds < 50
        killed._began_at = time.time() - 30
        killed.keep_seconds()
        resumed = attempt()
        assert 30 <= resumed.seconds < 50
        resumed.began()
        assert 30 <= resumed.seconds < 50
        resumed.forget_seconds(is_done=True)
        resumed.keep_seconds()  # as one of the run's main loop does that comes late
        assert attempt().seconds == 0.0
    assert list(node.folder.parent.iterdir()) == []
