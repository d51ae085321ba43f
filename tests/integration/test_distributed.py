"""Several workers through Ray Train: the same training as one worker does in place."""

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def pair(tmp_path_factory, toy_in, heliostat_in):
    """One config trained by one worker and by two, in one run: the records, and the nodes of the run's document."""
    toy = toy_in(tmp_path_factory.mktemp("distributed") / "toy")
    config = {"epochs": 3, "batch_size": 64, "strategy": "ddp"}
    document = toy.document
    document["stages"] = [
        {"name": "one", "uses": "train", "config": {**config, "strategy": "auto"}, "resources": {"workers": 1}},
        {"name": "two", "uses": "train", "config": config, "resources": {"workers": 2}},
    ]
    toy.write(document)
    done = heliostat_in(toy.folder)("run", "toy.yaml", "--json", timeout=500)
    assert done.returncode == 0, done.stderr
    nodes = {node["name"]: node for node in json.loads(done.stdout)["nodes"]}
    return {name: json.loads((Path(node["path"]) / "record.json").read_text()) for name, node in nodes.items()}


def test_two_workers_reach_what_one_reaches_at_the_same_global_batch(pair):
    one, two = pair["one"], pair["two"]
    names = ("train_loss", "val_loss", "val_accuracy")
    for alone, together in zip(one["details"]["history"], two["details"]["history"], strict=True):
        assert {n: together[n] for n in names} == pytest.approx({n: alone[n] for n in names}, abs=1e-3)
    for name in ("val_loss", "val_accuracy", "test_loss", "test_accuracy"):
        assert two["metrics"][name] == pytest.approx(one["metrics"][name], abs=1e-3)


def test_the_artifact_of_several_workers_is_like_any_other(pair):
    assert pair["two"]["files"].keys() == pair["one"]["files"].keys() == {"model.json", "weights.pt", "code/toy.py"}
    assert pair["two"]["details"]["parity"]["max_abs_diff"] == 0
