"""The projects that people start from: the one that `init` makes, and the MNIST demo."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "pipelines" / "mnist.yaml"


def test_the_project_that_init_makes_can_be_planned_from_another_folder(heliostat, tmp_path):
    assert heliostat("init", tmp_path / "mine").returncode == 0
    planned = heliostat("plan", tmp_path / "mine" / "pipeline.yaml", "--json")
    assert planned.returncode == 0, planned.stderr
    assert {node["status"] for node in json.loads(planned.stdout)["nodes"]} == {"run"}


@pytest.mark.slow
def test_the_project_that_init_makes_runs_from_another_folder(heliostat, tmp_path):
    made = heliostat("init", tmp_path / "mine")
    assert made.returncode == 0, made.stderr
    file = tmp_path / "mine" / "pipeline.yaml"
    assert f"next: heliostat run {file}" in made.stdout
    smaller = ["stages.search.config.trials=2", "stages.search.config.train.epochs=1", "stages.train.config.epochs=3"]
    smaller += ["stages.prune.matrix={sparsity: [0.5]}", "stages.prune.config.finetune_epochs=1"]
    smaller += ["stages.best.config.max_drop={val_accuracy: 0.5}"]
    done = heliostat("run", file, "--json", *(word for s in smaller for word in ("--set", s)), timeout=550)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert {node["status"] for node in document["nodes"]} == {"ran"}
    assert document["selected"]["metrics"]["test_accuracy"] > 0.5

    predict = [sys.executable, tmp_path / "mine" / "predict.py", document["selected"]["path"]]
    shown = subprocess.run(predict, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True).stdout
    predicted, true = (json.loads(line.partition(":")[2]) for line in shown.splitlines())
    assert len(predicted) == len(true) == 8
    assert all(digit in range(10) for digit in predicted)


def test_init_overwrites_nothing(heliostat, tmp_path):
    (tmp_path / "task.py").write_text("mine")
    refused = heliostat("init", tmp_path)
    assert (refused.returncode, "is there already; name a new folder" in refused.stderr) == (2, True)
    assert (tmp_path / "task.py").read_text() == "mine"


@pytest.mark.slow
def test_the_demo_runs_at_reduced_size_and_then_reuses_everything(heliostat, tmp_path):
    settings = [f"storage={tmp_path / 'store'}", "stages.search.config.trials=2", "stages.search.config.train.epochs=1"]
    settings += ["stages.train.config.epochs=1", "stages.student.config.epochs=1"]
    settings += ["stages.prune.config.finetune_epochs=1", "stages.best.config.max_drop={val_accuracy: 0.9}"]
    command = ["run", DEMO, "--json", *(word for setting in settings for word in ("--set", setting))]
    first = heliostat(*command, timeout=580)
    assert first.returncode == 0, first.stderr
    ran = json.loads(first.stdout)
    assert {node["status"] for node in ran["nodes"]} == {"ran"}
    assert {node["uses"] for node in ran["nodes"]} == {"tune", "train", "prune", "distill", "quantize", "select"}

    second = heliostat(*command)
    assert second.returncode == 0, second.stderr
    reused = json.loads(second.stdout)
    assert {node["status"] for node in reused["nodes"]} == {"reused"}
    assert reused["selected"] == ran["selected"]
