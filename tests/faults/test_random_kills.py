"""A search killed at random moments, with all its processes, and the same command until it is done."""

import json
import os
import random
import signal
import subprocess
import time
from contextlib import suppress

import pytest

SLOW = """

import time

quick_accuracy = accuracy


def accuracy(outputs, targets):
    time.sleep(0.2)
    return quick_accuracy(outputs, targets)
"""
SEARCH = {
    "algorithm": "bayesian",
    "trials": 12,
    "space": {"optimizer.lr": {"loguniform": [0.001, 0.1]}, "model_args.width": {"choice": [4, 8, 16]}},
    "scheduler": {"asha": {"reduction_factor": 2}},
    "train": {"epochs": 3},
}
KILLS = 4
SEED = 20


@pytest.mark.slow
def test_a_search_killed_at_random_moments_is_the_search_that_was_never_killed(
    tmp_path, toy_in, heliostat_in, processes_with, eventually
):
    def project(name):
        toy = toy_in(tmp_path / name)
        toy.module.write_text(toy.module.read_text() + SLOW)
        document = toy.document
        one_at_a_time = {"max_concurrent_trials": 1}
        document["stages"] = [{"name": "search", "uses": "tune", "config": SEARCH, "resources": one_at_a_time}]
        toy.write(document)
        return toy, heliostat_in(toy.folder)

    def journal(toy):
        """Its complete lines, so far."""
        texts = [path.read_text() for path in toy.folder.glob(".heliostat/toy/search/*/journal.jsonl")]
        return [json.loads(line) for text in texts for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def told(events, kind, *fields):
        return [[event[field] for field in fields] for event in events if event["event"] == kind]

    def best(done):
        (node,) = json.loads(done.stdout)["nodes"]
        record = json.loads((tmp_path / node["path"] / "record.json").read_text())
        return record["details"]["best_trial"], record["params"], record["metrics"]["val_loss"]

    whole, command = project("whole")
    uninterrupted = command("run", "toy.yaml", "--json")
    assert uninterrupted.returncode == 0, uninterrupted.stderr

    torn, command = project("torn")
    mark = f"TOY_FOLDER={torn.folder}"
    rng = random.Random(SEED)
    for number in range(1, KILLS + 1):
        lines = len(journal(torn)) + rng.randint(1, 9)
        more_s = rng.uniform(0, 0.5)
        process = subprocess.Popen(
            [*command.command, "run", "toy.yaml"],
            cwd=torn.folder,
            env={**command.environment, "TOY_FOLDER": str(torn.folder)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        eventually(lambda n=lines: len(journal(torn)) >= n, "it goes on", unless=lambda p=process: p.poll() is not None)
        time.sleep(more_s)
        for pid in processes_with(mark):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        eventually(lambda: not processes_with(mark), "processes outlive the kill")
        ended = len(told(journal(torn), "ended", "id"))
        print(f"seed {SEED}, kill {number}, {more_s:.2f} s after line {lines} of the journal: {ended} trials had ended")
        assert ended < SEARCH["trials"], "too late: make the search longer"

    done = command("run", "toy.yaml", "--json")
    assert done.returncode == 0, done.stderr
    for kind, fields in (("suggested", ("id", "params")), ("ended", ("id", "status"))):
        assert told(journal(torn), kind, *fields) == told(journal(whole), kind, *fields)
    assert best(done) == best(uninterrupted)
