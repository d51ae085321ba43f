"""Weights that two layers share: what is saved was validated, and the tie is kept."""

import json
from pathlib import Path

import pytest

from heliostat.compression.formats import load_torch


@pytest.mark.slow
def test_tied_weights_stay_tied_and_the_model_never_grows(case_file, heliostat):
    process = heliostat("run", case_file("tied/pipeline.yaml"), "--json")
    nodes = {node["name"]: node for node in json.loads(process.stdout)["nodes"]}
    assert {name: node["status"] for name, node in nodes.items()} == dict.fromkeys(nodes, "ran")
    for name in ("train", "averaged", "prune", "thin"):
        model = load_torch(Path(nodes[name]["path"]))
        assert model.decoder.weight is model.embedding.weight
        details = json.loads(Path(nodes[name]["path"], "record.json").read_text())["details"]
        validated = details["history"][details["best_epoch"] - 1]
        assert nodes[name]["metrics"]["val_loss"] == pytest.approx(validated["val_loss"], rel=1e-3)
    whole = nodes["train"]["metrics"]["num_params"]
    assert nodes["prune"]["metrics"]["num_params"] < whole
    assert nodes["thin"]["metrics"]["num_params"] < whole
