"""A trial and a task that take all the memory they can get, until Ray kills their processes."""

import json

import pytest

HUNGRY = """

import os
import time

plain_model, held = build_model, []


def build_model(width=16, eats=None):
    with open(os.environ["TOY_BUILDS"], "a") as file:
        file.write(f"{eats}\\n")
    if eats == "more than there is":
        torch.empty(2**60)
    for _ in range(40 if eats == "all" else 0):
        held.append(torch.ones(2**25))  # 128 MiB, and so at most 5 GiB
        time.sleep(0.02)
    return plain_model(width)
"""
ROOM_BYTES = 2.5e9
"""More than Ray and its workers need by themselves."""


@pytest.fixture(scope="module")
def hungry(tmp_path_factory, toy_in, heliostat_in):
    """A run whose second trial, and whose student, take memory up to where Ray was told that there is no more."""
    from ray._common.utils import get_system_memory
    from ray._private.utils import get_used_memory

    toy = toy_in(tmp_path_factory.mktemp("hungry") / "toy")
    toy.module.write_text(toy.module.read_text() + HUNGRY)
    document = toy.document
    grid = {"model_args.eats": {"grid": [None, "all", "more than there is", "nothing"]}}
    document["stages"] = [
        {
            "name": "search",
            "uses": "tune",
            "config": {"algorithm": "grid", "space": grid, "train": {"epochs": 2}},
            "resources": {"max_concurrent_trials": 1},
            "retries": 1,
        },
        {"name": "train", "uses": "train", "inputs": {"params": "search"}, "config": {"epochs": 1}},
        {
            "name": "greedy",
            "uses": "distill",
            "inputs": {"teacher": "train"},  # so that it comes after the search
            "config": {"model_args": {"eats": "all"}, "epochs": 1},
            "retries": 1,
        },
    ]
    toy.write(document)
    command = heliostat_in(toy.folder)
    builds = toy.folder / "builds.txt"
    switches = {
        "TOY_BUILDS": str(builds),
        "RAY_memory_monitor_refresh_ms": "50",
        "RAY_memory_usage_threshold": str((get_used_memory() + ROOM_BYTES) / get_system_memory()),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in switches.items():
            patch.setenv(name, value)
        done = command("run", "toy.yaml", "--json", timeout=200)
    return toy, done, builds.read_text().split("\n")


@pytest.mark.slow
def test_a_trial_that_runs_out_of_memory_has_failed_for_that_reason_and_the_others_go_on(hungry):
    toy, done, _ = hungry
    (table,) = toy.folder.glob(".heliostat/toy/search/*/trials.json")
    trials = json.loads(table.read_text())
    assert [trial["status"] for trial in trials] == ["done", "failed", "failed", "done"], done.stderr
    assert trials[1]["reason"].startswith("killed because the machine ran out of memory: ")
    assert "running low on memory" in trials[1]["reason"]
    assert trials[2]["reason"].startswith("RuntimeError: ")
    assert "allocate" in trials[2]["reason"]
    assert "toy.py" in trials[2]["reason"]


@pytest.mark.slow
def test_what_ran_out_of_memory_is_tried_again_as_often_as_asked(hungry):
    toy, done, builds = hungry
    assert builds.count("more than there is") == 1  # bad code is not
    (journal,) = toy.folder.glob(".heliostat/toy/search/*/journal.jsonl")
    events = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [event["id"] for event in events if event["event"] == "restarted"] == ["0002"]
    nodes = {node["name"]: node for node in json.loads(done.stdout)["nodes"]}
    assert nodes["train"]["status"] == "ran"
    assert nodes["greedy"]["status"] == "failed"
    assert nodes["greedy"]["error"].startswith("killed because the machine ran out of memory")
    assert builds.count("all") == 4  # the trial twice, the student twice


@pytest.mark.slow
def test_the_reason_is_in_the_history(hungry):
    _, done, _ = hungry
    from heliostat.tracking import quiet

    quiet.silence()
    import mlflow

    client = mlflow.MlflowClient(json.loads(done.stdout)["tracking"]["uri"])
    experiment = client.get_experiment_by_name("toy")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    status = {name: run.info.status for name, run in runs.items()}
    assert status["search"] == "FINISHED"
    assert [status[f"000{n}"] for n in (1, 2, 3, 4)] == ["FINISHED", "FAILED", "FAILED", "FINISHED"]
    assert runs["0002"].data.tags["heliostat.error"].startswith("killed because the machine ran out of memory")
    assert "error.txt" in {file.path for file in client.list_artifacts(runs["0002"].info.run_id)}
