"""`kill -9` of everything in a search over chains, and the same command again: only what was unfinished is made."""

import json
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

COUNTED = """

import os
import time

quick_accuracy = accuracy


class Counted(torch.optim.SGD):
    def __init__(self, params, lr=0.01):
        params = list(params)
        with open(os.environ["TOY_TRAININGS"], "a") as file:
            file.write(f"{sum(p.numel() for p in params)}\\n")
        super().__init__(params, lr=lr)


def accuracy(outputs, targets):
    time.sleep(0.1)
    return quick_accuracy(outputs, targets)
"""
PASSES = [
    {
        "prune": {
            "sparsity": {"choice": [0.25, 0.5, 0.75]},
            "finetune_epochs": 4,
            "optimizer.name": "toy:Counted",
        }
    },
    {"quantize": {"method": {"choice": ["static", "dynamic"]}}},
]


@pytest.mark.slow
def test_links_that_were_made_are_not_made_again(toy, heliostat_in, kill_when):
    toy.module.write_text(toy.module.read_text() + COUNTED)
    document = toy.document
    config = {"max_drop": {"val_accuracy": 1.0}, "trials": 12, "passes": PASSES}
    document["stages"] = [
        {"name": "train", "uses": "train", "config": {"epochs": 1}},
        {"name": "small", "uses": "compress", "inputs": {"model": "train"}, "config": config},
    ]
    toy.write(document)
    cli, trainings = heliostat_in(toy.folder), toy.folder / "trainings.txt"

    def made():
        """The folders of the models that are pruned and done."""
        found = toy.folder.glob(".heliostat/toy/small/shelf/*/*/made.json")
        return [path.parent for path in found if (path.parent / "weights.pt").exists()]

    kill_when(
        cli,
        "run",
        "toy.yaml",
        cwd=toy.folder,
        moment=lambda: len(made()) >= 2,
        what="two models are pruned",
        TOY_TRAININGS=str(trainings),
    )
    weights = [torch.load(folder / "weights.pt", weights_only=True) for folder in made()]
    sizes = [sum(tensor.numel() for tensor in tensors.values()) for tensors in weights]

    def run(*arguments):
        return subprocess.run(
            [*cli.command, "run", "toy.yaml", *arguments, "--json"],
            cwd=toy.folder,
            env={**cli.environment, "TOY_TRAININGS": str(trainings)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    done = run()
    assert done.returncode == 0, done.stderr
    (small,) = (node for node in json.loads(done.stdout)["nodes"] if node["name"] == "small")
    details = json.loads(Path(small["path"], "record.json").read_text())["details"]
    assert details["trials"] == {"done": 12}
    assert details["passes"] == {"in_all_chains": 17, "made": 11}
    began = Counter(int(line) for line in trainings.read_text().split())
    assert len(began) == 3
    assert [began[size] for size in sizes] == [1] * len(sizes)

    # and any of them is made again when a trial is, aside from the others
    trials = json.loads(Path(small["path"], "trials.json").read_text())
    pruned = next(trial["id"] for trial in trials if trial["params"]["step_1"] == "prune")
    again = run("--trial", pruned)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["identical"]
    assert len(trainings.read_text().split()) == sum(began.values()) + 1
