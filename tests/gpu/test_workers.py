"""Workers and trials of a pipeline, each with a GPU or a part of one."""

import json

import pytest

pytestmark = pytest.mark.gpu

ON_GPU = """


def train_step(model, batch):
    inputs, targets = batch
    assert inputs.is_cuda and next(model.parameters()).is_cuda
    return nn.functional.cross_entropy(model(inputs), targets)
"""


@pytest.fixture
def run(toy, heliostat):
    """What `run --json` says of a pipeline whose training steps refuse to be anywhere but on a GPU."""

    def answer(*stages):
        toy.module.write_text(toy.module.read_text() + ON_GPU)
        task = {**toy.document["task"], "train_step": "toy:train_step"}
        toy.write({**toy.document, "task": task, "stages": list(stages)})
        done = heliostat("run", toy.file, "--json")
        assert done.returncode == 0, done.stderr
        return {node["name"]: node for node in json.loads(done.stdout)["nodes"]}

    return answer


def training(name, *, strategy="auto", **resources):
    return {
        "name": name,
        "uses": "train",
        "config": {"epochs": 3, "strategy": strategy},
        "resources": {"gpus_per_worker": 1, **resources},
    }


def test_workers_that_share_a_gpu_train_what_one_worker_trains(run):
    nodes = run(training("one"), training("halves", strategy="ddp", workers=2, gpus_per_worker=0.5))
    assert nodes["halves"]["metrics"]["val_loss"] == pytest.approx(nodes["one"]["metrics"]["val_loss"], abs=1e-4)


def test_trials_share_a_gpu(run):
    search = {
        "name": "search",
        "uses": "tune",
        "config": {"trials": 4, "space": {"optimizer.lr": {"loguniform": [0.001, 0.1]}}, "train": {"epochs": 2}},
        "resources": {"gpus_per_worker": 0.5},
    }
    assert run(search)["search"]["status"] == "ran"
