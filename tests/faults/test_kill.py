"""`kill -9` of everything during search, training and compression, and each time the same command again.

One pipeline is killed three times and then finishes. What the tests look at: that nothing finished ran again (records
untouched, trials built once, epochs with the very durations that the killed process measured), and a complete result.
"""

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

SLOW = """

import os
import time

quick_accuracy, plain_model = accuracy, build_model


def build_model(width=16, trial=0.0):
    with open(os.environ["TOY_BUILDS"], "a") as file:
        file.write(f"{trial}\\n")
    return plain_model(width)


def accuracy(outputs, targets):
    time.sleep(0.4)
    return quick_accuracy(outputs, targets)
"""
TRIALS = 5
TRAIN_EPOCHS = 6
TUNE_EPOCHS = 6


@pytest.fixture(scope="module")
def story(tmp_path_factory, toy_in, heliostat_in, kill_when):
    """The run, killed three times and then finished; what was there at each kill."""
    toy = toy_in(tmp_path_factory.mktemp("kill") / "toy")
    toy.module.write_text(toy.module.read_text() + SLOW)
    toy.write(pipeline())
    cli = heliostat_in(toy.folder)
    builds = toy.folder / "builds.txt"
    store = toy.folder / ".heliostat" / "toy"

    def killed_when(moment, what):
        return kill_when(cli, "run", "toy.yaml", cwd=toy.folder, moment=moment, what=what, TOY_BUILDS=str(builds))

    def journal():
        text = "".join(path.read_text() for path in store.glob("search/*/journal.jsonl"))
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def epochs(stage):
        names = [path.name for path in store.glob(f"{stage}/*/checkpoints/epoch-*.pt")]
        return max((int(name[6:11]) for name in names), default=0)

    told = SimpleNamespace(toy=toy, store=store, output=[])
    told.output += [killed_when(lambda: sum(e["event"] == "ended" for e in journal()) >= 2, "two trials have ended")]
    told.journal_at_kill, told.builds_at_kill = journal(), builds.read_text().split()

    told.output += [killed_when(lambda: epochs("train") >= 2, "training has two epochs")]
    told.journal, told.builds_of_search = journal(), builds.read_text().split()
    told.trained_at_kill = history_at_kill(store / "train")
    told.records_at_kill = records(store)

    told.output += [killed_when(lambda: epochs("prune") >= 2, "fine-tuning has two epochs")]
    told.tuned_at_kill = history_at_kill(store / "prune")
    told.records_at_third_kill = records(store)

    told.last = subprocess.run(
        [*cli.command, "run", "toy.yaml", "--json"],
        cwd=toy.folder,
        env={**cli.environment, "TOY_BUILDS": str(builds)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    told.records = records(store)
    return told


def pipeline():
    search = {
        "algorithm": "bayesian",
        "trials": TRIALS,
        "space": {
            "optimizer.lr": {"loguniform": [0.001, 0.1]},
            "model_args.trial": {"uniform": [0.0, 1.0]},  # tells the trials apart in the file of builds
        },
        "train": {"epochs": 2},
    }
    prune = {"sparsity": 0.25, "finetune_epochs": TUNE_EPOCHS}
    return {
        "name": "toy",
        "task": {"model": "toy:build_model", "data": "toy:build_data", "metrics": ["toy:accuracy"]},
        "stages": [
            {"name": "search", "uses": "tune", "config": search},
            {
                "name": "train",
                "uses": "train",
                "inputs": {"params": "search"},
                "config": {"epochs": TRAIN_EPOCHS},
                "resources": {"workers": 2},
            },
            {"name": "prune", "uses": "prune", "inputs": {"model": "train"}, "config": prune},
            {
                "name": "best",
                "uses": "select",
                "inputs": {"baseline": "train", "candidates": ["train", "prune"]},
                "config": {"max_drop": {"val_accuracy": 0.2}},
            },
        ],
    }


def records(store):
    """Every finished node of the store: when its record was written, and what it says."""
    return {
        path.parts[-3]: (path.stat().st_mtime_ns, json.loads(path.read_text()))
        for path in store.glob("*/*/record.json")
    }


def history_at_kill(stage: Path):
    newest = max(stage.glob("*/checkpoints/epoch-*.pt"), key=lambda path: path.name)
    return torch.load(newest, weights_only=True)["progress"]["history"]


def ids(events, kind):
    return [event["id"] for event in events if event["event"] == kind]


def test_the_result_is_complete(story):
    assert story.last.returncode == 0, story.last.stderr
    document = json.loads(story.last.stdout)
    states = {node["name"]: node["status"] for node in document["nodes"]}
    assert states == {"search": "reused", "train": "reused", "prune": "ran", "best": "ran"}
    assert document["selected"]["metrics"]["val_accuracy"] > 0.3
    assert not list(story.store.glob("*/*/checkpoints"))


def test_each_run_was_killed_where_it_should_be(story):
    assert [Path(output).name for output in story.output if "Traceback" in output] == []
    assert story.records_at_kill.keys() == {"search"}
    assert story.records_at_third_kill.keys() == {"search", "train"}


def test_finished_trials_are_not_run_again(story):
    before = ids(story.journal_at_kill, "ended")
    assert 2 <= len(before) < TRIALS
    assert sorted(ids(story.journal, "ended")) == [f"{n:04d}" for n in range(1, TRIALS + 1)]
    assert not set(before) & set(ids(story.journal, "restarted"))
    params = {e["id"]: e["params"]["model_args.trial"] for e in story.journal if e["event"] == "suggested"}
    built_then, built = Counter(story.builds_at_kill), Counter(story.builds_of_search)
    best = story.records["search"][1]["details"]["best_trial"]
    for trial in before:
        assert built_then[str(params[trial])] == 1
        if trial != best:  # the training builds the best one's model too
            assert built[str(params[trial])] == 1


def test_a_trial_that_was_under_way_begins_anew_with_its_parameters(story):
    under_way = set(ids(story.journal_at_kill, "suggested")) - set(ids(story.journal_at_kill, "ended"))
    assert under_way
    assert set(ids(story.journal, "restarted")) == under_way
    assert len(ids(story.journal, "suggested")) == len(set(ids(story.journal, "suggested"))) == TRIALS


def test_training_goes_on_from_its_last_checkpoint(story):
    kept = story.trained_at_kill
    history = story.records["train"][1]["details"]["history"]
    assert 2 <= len(kept) < len(history) == TRAIN_EPOCHS
    assert history[: len(kept)] == kept  # to the microsecond of each epoch's duration


def test_fine_tuning_goes_on_from_its_last_checkpoint(story):
    kept = story.tuned_at_kill
    history = story.records["prune"][1]["details"]["history"]
    assert 2 <= len(kept) < len(history) == TUNE_EPOCHS
    assert history[: len(kept)] == kept


def test_finished_nodes_are_not_run_again(story):
    assert story.records["search"] == story.records_at_kill["search"] == story.records_at_third_kill["search"]
    then, now = story.records_at_third_kill["train"][1], story.records["train"][1]
    assert now == {**then, "metrics": now["metrics"], "details": now["details"]}
    assert {name: now["metrics"][name] for name in then["metrics"]} == then["metrics"]
    assert {name: now["details"][name] for name in then["details"]} == then["details"]


def test_a_model_whose_speed_was_not_measured_yet_is_only_measured(story):
    then, now = story.records_at_third_kill["train"][1], story.records["train"][1]
    assert not any(name.startswith("latency") for name in then["metrics"])
    assert now["metrics"]["latency_ms"] > 0


def runs_in_mlflow(done):
    """The toy's runs by their names, and the client that found them."""
    from heliostat.tracking import quiet

    quiet.silence()
    import mlflow

    client = mlflow.MlflowClient(json.loads(done.stdout)["tracking"]["uri"])
    experiment = client.get_experiment_by_name("toy")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    return {run.info.run_name: run for run in runs}, client


def test_the_history_in_mlflow_is_complete_and_has_each_step_once(story):
    runs, client = runs_in_mlflow(story.last)
    trials = [f"{n:04d}" for n in range(1, TRIALS + 1)]
    assert sorted(runs) == sorted(["toy", "search", *trials, "train", "prune", "best"])
    assert {name: run.info.status for name, run in runs.items() if run.info.status != "FINISHED"} == {}

    for name, epochs in {"train": TRAIN_EPOCHS, "prune": TUNE_EPOCHS, **dict.fromkeys(trials, 2)}.items():
        steps = [metric.step for metric in client.get_metric_history(runs[name].info.run_id, "val_loss")]
        assert [step for step in sorted(steps) if 1 <= step <= epochs] == list(range(1, epochs + 1)), name


KILLED_AFTER = """
import os, signal, sys
from heliostat import execution
from heliostat.cli import main
from heliostat.runtime import journal

def deadly(function, when):
    def wrapped(*args):
        function(*args)
        if when(*args):
            os.kill(os.getpid(), signal.SIGKILL)
    return wrapped

if sys.argv.pop(1) == "trial":
    journal.Journal.append = deadly(journal.Journal.append, lambda _, event: isinstance(event, journal.Ended))
else:
    execution.write_record = deadly(execution.write_record, lambda *_: True)
main()
"""


@pytest.mark.slow
def test_a_kill_in_the_instant_after_a_trial_or_a_node_leaves_no_run_open_in_mlflow(
    toy, heliostat, eventually, processes_with
):
    document = toy.document
    document["stages"] = document["stages"][:1]
    document["stages"][0]["config"] |= {"trials": 2, "algorithm": "random"}
    toy.write(document)
    mark = f"TOY_FOLDER={toy.folder}"
    for instant in ("trial", "node"):
        killed = subprocess.run(
            [sys.executable, "-P", "-c", KILLED_AFTER, instant, "run", str(toy.file)],
            env={**heliostat.environment, "TOY_FOLDER": str(toy.folder)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )
        assert killed.returncode == -signal.SIGKILL
        eventually(lambda: not processes_with(mark), "processes outlive their driver")
    done = heliostat("run", toy.file, "--json")
    assert [node["status"] for node in json.loads(done.stdout)["nodes"]] == ["reused"], done.stderr

    runs = runs_in_mlflow(done)[0]
    assert {name: run.info.status for name, run in runs.items()} == dict.fromkeys(
        ["toy", "search", "0001", "0002"], "FINISHED"
    )
    (journal,) = toy.folder.glob(".heliostat/toy/search/*/journal.jsonl")
    assert sorted(ids(map(json.loads, journal.read_text().splitlines()), "ended")) == ["0001", "0002"]
