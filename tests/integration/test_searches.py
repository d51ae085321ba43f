"""Searches that end before their last trial, run by two commands at once; then one of their trials again."""

import json
import shutil
import sqlite3
from pathlib import Path
from types import SimpleNamespace

import pytest

from heliostat.errors import SpecError
from heliostat.rerun import run_trial
from heliostat.runner import load_pipeline

ONE_AT_A_TIME = {"max_concurrent_trials": 1}
LR = {"optimizer.lr": {"loguniform": [0.001, 0.1]}}
TARGET = {"trials": 18, "space": LR, "stop_when": {"val_loss": 100.0}, "train": {"epochs": 2}}
TIMED = {"algorithm": "random", "trials": 5000, "space": LR, "wall_time_s": 20.0, "train": {"epochs": 1}}


def search_and_train(name, config):
    return [
        {"name": name, "uses": "tune", "config": config, "resources": ONE_AT_A_TIME},
        {"name": f"train_{name}", "uses": "train", "inputs": {"params": name}, "config": {"epochs": 1}},
    ]


def told(toy, output):
    """The nodes of a run by name, their records, and the trials of the only search."""
    nodes = {node["name"]: node for node in json.loads(output)["nodes"]}
    records = {name: json.loads((Path(n["path"]) / "record.json").read_text()) for name, n in nodes.items()}
    (search,) = (Path(node["path"]) for node in nodes.values() if node["uses"] == "tune")
    trials = json.loads((search / "trials.json").read_text())
    return SimpleNamespace(
        toy=toy, store=toy.folder / ".heliostat", nodes=nodes, records=records, search=search, trials=trials
    )


@pytest.fixture(scope="module")
def story(tmp_path_factory, toy_in, heliostat_in, eventually):
    """Two `run` commands on one store, the second begun while the first was at it."""
    toy = toy_in(tmp_path_factory.mktemp("searches") / "toy")
    document = toy.document
    document["stages"] = search_and_train("target", TARGET)
    toy.write(document)
    document["stages"] += search_and_train("timed", TIMED)
    toy.write(document, "two.yaml")
    command = heliostat_in(toy.folder)
    store = toy.folder / ".heliostat"
    first = command.start("run", "toy.yaml", "--json")
    try:
        eventually(lambda: list(store.glob("runs/*.json")), "the first has begun", unless=lambda: first.poll())
        second = command("run", "toy.yaml", "--json")
        out, err = first.communicate(timeout=200)
    finally:
        first.kill()
    assert (first.returncode, second.returncode) == (0, 0), err + second.stderr
    story = told(toy, out)
    story.second, story.command = second, command
    return story


# --- two commands at once ----------------------------------------------------------------------------


def test_the_second_command_says_that_it_waits_and_then_reuses_what_the_first_made(story):
    assert "another run of 'toy' is using this store; waiting for it to end" in story.second.stderr
    again = {node["name"]: node for node in json.loads(story.second.stdout)["nodes"]}
    assert {node["status"] for node in story.nodes.values()} == {"ran"}
    assert {node["status"] for node in again.values()} == {"reused"}
    assert {n: node["metrics"] for n, node in again.items()} == {n: node["metrics"] for n, node in story.nodes.items()}


def test_nothing_in_the_store_is_corrupt_or_there_twice(story):
    with sqlite3.connect(story.store / "mlflow.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        stopped = sum(trial["status"] == "stopped" for trial in story.trials)
        statuses = dict(database.execute("SELECT status, count(*) FROM runs GROUP BY status").fetchall())
        assert statuses.pop("KILLED", 0) == stopped
        assert statuses == {"FINISHED": 1 + len(story.nodes) + len(story.trials) - stopped}
        (runs,) = database.execute("SELECT count(*) FROM runs").fetchone()
    assert runs == 1 + len(story.nodes) + len(story.trials)
    assert not list(story.store.glob("spool/*.jsonl"))
    events = [json.loads(line) for line in (story.search / "journal.jsonl").read_text().splitlines()]
    assert [e["id"] for e in events if e["event"] == "ended"] == [trial["id"] for trial in story.trials]


@pytest.mark.slow
def test_two_pipelines_share_a_store_at_the_same_time(toy, heliostat):
    document = toy.document
    document["stages"] = search_and_train("target", TARGET)
    files = [toy.write({**document, "name": name}, f"{name}.yaml") for name in ("toy", "other")]
    processes = [heliostat.start("run", file, "--json") for file in files]
    ended = [(process.communicate(timeout=200), process.returncode) for process in processes]
    assert [code for _, code in ended] == [0, 0], ended
    assert not any("waiting for it to end" in err for (_, err), _ in ended)
    with sqlite3.connect(toy.folder / ".heliostat" / "mlflow.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        statuses = dict(database.execute("SELECT status, count(*) FROM runs GROUP BY status").fetchall())
        stopped = statuses.pop("KILLED", 0)  # a trial that the target stopped before its last epoch
        assert statuses == {"FINISHED": 8 - stopped}
    assert not list(toy.folder.glob(".heliostat/spool/*.jsonl"))


# --- searches that end early -------------------------------------------------------------------------


def check_the_best_so_far_was_trained(story, name):
    good = [trial for trial in story.trials if trial["status"] != "failed" and trial["metrics"]]  # those judged
    best = max(good, key=lambda trial: trial["metrics"]["val_accuracy"])
    assert story.records[name]["details"]["best_trial"] == best["id"]
    trained = story.records[f"train_{name}"]["params"]["train"]
    assert trained["optimizer"]["lr"] == best["params"]["optimizer.lr"]


def test_a_search_ends_with_its_target_and_the_best_so_far_is_trained(story):
    assert story.records["target"]["details"]["ended_by"] == "target"
    assert len(story.trials) == 1
    check_the_best_so_far_was_trained(story, "target")


@pytest.mark.slow
def test_a_search_ends_with_its_time_and_the_best_so_far_is_trained(toy, heliostat):
    document = toy.document
    document["stages"] = search_and_train("timed", TIMED)
    done = heliostat("run", toy.write(document), "--json")
    assert done.returncode == 0, done.stderr
    timed = told(toy, done.stdout)
    assert timed.records["timed"]["details"]["ended_by"] == "wall time"
    assert 1 <= len(timed.trials) < TIMED["trials"]
    check_the_best_so_far_was_trained(timed, "timed")


def test_the_record_says_which_method_auto_picked_and_why(story):
    details = story.records["target"]["details"]
    assert details["algorithm"] == "random"
    assert details["why"] == "18 trials are too few to learn a model of the space from"


# --- a trial again -----------------------------------------------------------------------------------


def test_a_trial_of_a_finished_search_is_run_again_with_the_same_figures_and_leaves_no_trace(story):
    before = {path: path.stat().st_mtime_ns for path in story.store.glob("toy/**/*")}
    done = story.command("run", "toy.yaml", "--trial", "target/0001", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    (trial,) = story.trials
    assert document.keys() == {"node", "trial", "params", "then", "now", "metrics", "identical", "changed"}
    assert (document["node"], document["trial"], document["params"]) == ("target", "0001", trial["params"])
    assert document["identical"] is True
    assert {row["metric"]: row["difference"] for row in document["metrics"]}["val_loss"] == 0
    assert document["then"]["metrics"] == trial["metrics"]
    after = {path: path.stat().st_mtime_ns for path in story.store.glob("toy/**/*")}
    assert {path for path in after if path.is_file() and after[path] != before[path]} == set()
    assert after.keys() == before.keys()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("0001", [], "there are several searches; say which: target/0001 or timed/0001"),
        ("targte/0001", [], "no search 'targte'; did you mean 'target'"),
        ("train_target/0001", [], "the stage 'train_target' has no trials; did you mean 'target'?"),
        ("target/0011", [], "'0011' does not exist; did you mean '0001'"),
        (
            "target/0001",
            ["stages.target.config.train.epochs=3"],
            "target has not run with this code and config: config.train.epochs 2 -> 3",
        ),
        ("timed/0001", [], "timed has not run with this code and config: first run"),
        ("target/0001", ["storage=elsewhere"], "target has not run with this code and config: first run"),
    ],
)
def test_a_trial_that_cannot_be_run_again_is_refused_with_the_reason(story, name, settings, message):
    with pytest.raises(SpecError) as refused:
        run_trial(load_pipeline(story.toy.folder / "two.yaml", settings=settings), name)
    assert message in str(refused.value)


def test_a_trial_of_other_code_is_not_run_again(story, tmp_path):
    shutil.copytree(story.toy.folder, tmp_path / "toy")
    module = tmp_path / "toy" / "toy.py"
    module.write_text(module.read_text() + "\nMORE = 1\n")
    with pytest.raises(SpecError, match=r"target has not run with this code and config: toy\.py changed"):
        run_trial(load_pipeline(tmp_path / "toy" / "toy.yaml"), "target/0001")
