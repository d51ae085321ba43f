"""The JSON that other people's scripts rely on, and the history of runs that the store keeps."""

import json
import os
from pathlib import Path

import pytest

from heliostat.core.artifact import Record, write_record
from heliostat.core.load import load_pipeline
from heliostat.core.outcome import NodeOutcome, RunResult
from heliostat.errors import SpecError
from heliostat.report.documents import plan_document, run_document
from heliostat.report.runs import find, new_run_id, read_runs, write_run
from heliostat.runner import plan

RESULT = RunResult(
    pipeline="toy",
    status="failed",
    nodes=(
        NodeOutcome("train", "train", "train", "ran", "a" * 16, Path("/s/train"), 1.23456, {"val_loss": 0.5}),
        NodeOutcome("int8", "int8", "quantize", "failed", "b" * 16, Path("/s/int8"), 0.5, error="no"),
    ),
    tracking={"uri": "sqlite:///x", "experiment": "toy", "run_id": "1"},
    selected=None,
)


def test_a_run_is_told_with_the_keys_that_were_promised():
    document = json.loads(json.dumps(run_document(RESULT)))
    assert {"pipeline", "status", "nodes", "tracking", "selected"} <= set(document)
    assert document["nodes"][0] == {
        "name": "train",
        "stage": "train",
        "uses": "train",
        "status": "ran",
        "fingerprint": "a" * 16,
        "path": "/s/train",
        "seconds": 1.235,
        "metrics": {"val_loss": 0.5},
    }
    assert document["nodes"][1]["error"] == "no"
    assert document["tracking"] == {"uri": "sqlite:///x", "experiment": "toy", "run_id": "1"}


def test_a_plan_is_told_with_the_same_nodes_and_their_reasons(toy):
    document = json.loads(json.dumps(plan_document(plan(load_pipeline(toy.file)), why_not="too large")))
    assert document["pipeline"] == "toy"
    first = document["nodes"][0]
    assert {"name", "stage", "uses", "status", "reason", "fingerprint", "path"} <= set(first)
    assert (first["status"], first["reason"]) == ("run", "first run")
    assert (first["trials"], first["epochs"]) == (4, 8)
    assert first["needs"] == {"cpus": 1.0, "gpus": 0.0}
    assert first["config"]["train"]["batch_size"] == 64
    assert document["estimate"] == {
        "nodes_to_run": 10,
        "trials": 4,
        "epochs": 8 + 3 + 2 + 2,
        "seconds": None,
        "cpu_hours": None,
    }
    assert document["fits"] == {"ok": False, "reason": "too large"}


def test_runs_are_listed_newest_first(tmp_path):
    for age, name in enumerate(["newest", "middle", "oldest"]):
        write_run(tmp_path, name, run_document(RESULT))
        os.utime(tmp_path / "runs" / f"{name}.json", (1000 - age, 1000 - age))
    assert [document["run"] for document in read_runs(tmp_path)] == ["newest", "middle", "oldest"]
    assert read_runs(tmp_path / "nowhere") == []


def test_a_run_is_named_after_its_pipeline_and_the_time():
    name, date, time, milliseconds = new_run_id("toy").split("-")
    assert (name, len(date), len(time), len(milliseconds)) == ("toy", 8, 6, 3)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store with one run and three nodes, two of which have one name; commands name it relative to where they are."""
    monkeypatch.chdir(tmp_path)
    store = Path(".heliostat")
    write_run(store, "toy-20240101-000000", run_document(RESULT))
    for day, node, digest in [(1, "train", "aaaa1111bbbb2222"), (2, "train", "cccc1111"), (3, "best", "dddd1111")]:
        folder = store / "toy" / node / digest
        folder.mkdir(parents=True)
        record = Record("model", "toy", node, node, node, digest, {}, started_at=f"2024-01-0{day}")
        write_record(folder, record)
    return store


@pytest.mark.parametrize(
    ("name", "fingerprint"),
    [
        ("train", "cccc1111"),
        ("best", "dddd1111"),
        ("aaaa1111bbbb2222", "aaaa1111bbbb2222"),
        ("aaaa11", "aaaa1111bbbb2222"),
        (".heliostat/toy/train/aaaa1111bbbb2222", "aaaa1111bbbb2222"),
    ],
)
def test_a_node_is_found_by_name_fingerprint_or_folder_and_of_several_the_newest(store, name, fingerprint):
    folder, record = find(store, name)
    assert record.fingerprint == fingerprint
    assert folder.name == fingerprint


def test_a_run_is_found_by_its_name(store):
    assert find(store, "toy-20240101-000000")["status"] == "failed"


def test_what_is_not_there_is_an_error_with_the_nearest_name(store):
    with pytest.raises(SpecError, match="no run or node 'trian'; did you mean 'train'"):
        find(store, "trian")
    with pytest.raises(SpecError, match="no run or node 'aaaa'"):
        find(store, "aaaa")
