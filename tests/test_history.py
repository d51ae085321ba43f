"""What a run tells MLflow of runs before it: which it goes on with, which it ends, and what it mends."""

from dataclasses import replace

import mlflow
import pytest

from heliostat.core.artifact import Record, read_record, write_record
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
            killed.started(node)
            killed.reporter(node, None, when_nearly_over=nothing_follows).trial_started("0001", {})
    with History.open(planned, "toy/mine", print, ["toy/mine", "toy/0@killed"]):
        pass
    below = ("", f"/{node.fingerprint}", f"/{node.fingerprint}/0001")
    status = {key: run.info.status for key, run in tracked(planned).items()}
    assert status == {f"toy/0@killed{end}": "KILLED" for end in below} | {f"toy/mine{end}": "RUNNING" for end in below}


def test_a_model_that_could_not_be_measured_and_then_was_has_finished_in_the_run_that_made_it(planned):
    node = planned.node("train")
    with History.open(planned, "toy/first", print) as first:
        first.started(node)
        record = record_of(node, first, metrics={"val_loss": 0.5})
        first.finished(node, record)
        first.failed(node, "its speed cannot be measured: RuntimeError", record)
    key = f"toy/first/{node.fingerprint}"
    assert tracked(planned)[key].info.status == "FAILED"
    with History.open(planned, "toy/second", print) as second:
        second.measured(node, record, {"latency_ms": 0.25})
    run = tracked(planned)[key]
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"val_loss": 0.5, "latency_ms": 0.25})
    assert errors_of(planned, run) == (None, [])


def test_a_node_that_failed_and_then_succeeded_carries_no_error(planned):
    node = planned.node("train")
    with History.open(planned, "toy/mine", print) as first:
        first.started(node)
        first.failed(node, "ValueError: no\n  File ...")
    key = f"toy/mine/{node.fingerprint}"
    assert errors_of(planned, tracked(planned)[key]) == ("ValueError: no", ["error.txt"])
    with History.open(planned, "toy/mine", print) as second:
        second.started(node)
        second.finished(node, record_of(node, second))
    run = tracked(planned)[key]
    assert run.info.status == "FINISHED"
    assert errors_of(planned, run) == (None, [])


def test_a_model_of_an_old_store_whose_record_does_not_name_its_run_is_told_of_in_this_one(planned):
    node = planned.node("train")
    with History.open(planned, "toy/mine", print) as history:
        record = record_of(node, history, metrics={"val_loss": 0.5}, tracking={"run_id": "of another time"})
        history.failed(node, "its speed cannot be measured", record)
        history.measured(node, replace(record, metrics={"val_loss": 0.5, "latency_ms": 0.25}), {"latency_ms": 0.25})
    run = tracked(planned)[f"toy/mine/{node.fingerprint}"]
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"val_loss": 0.5, "latency_ms": 0.25})
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
    assert run.info.status == ("FAILED" if status == "failed" else "FINISHED")


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
