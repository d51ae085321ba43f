"""Layers that compute their weights go through every stage, and the saved model is the validated one."""

import json
from pathlib import Path

import pytest


@pytest.mark.slow
def test_weight_norm_and_spectral_norm_survive_every_stage(case_file, heliostat):
    process = heliostat("run", case_file("weight_norm/pipeline.yaml"), "--json", timeout=560)
    nodes = {node["name"]: node for node in json.loads(process.stdout)["nodes"]}
    assert {name: node["status"] for name, node in nodes.items()} == dict.fromkeys(nodes, "ran")
    for name, node in nodes.items():
        details = json.loads(Path(node["path"], "record.json").read_text())["details"]
        if name.startswith(("train", "prune", "thin")):
            best = details["history"][details["best_epoch"] - 1]
            assert node["metrics"]["val_loss"] == pytest.approx(best["val_loss"], rel=1e-3)
        elif name.startswith(("int8", "onnx")):
            (source,) = (other for other in nodes if name.endswith(f"[{other}]"))
            assert node["metrics"]["val_loss"] == pytest.approx(nodes[source]["metrics"]["val_loss"], rel=0.02)
        else:
            best = details["history"][details["best_epoch"] - 1]
            assert node["metrics"]["val_loss"] == pytest.approx(best["val_loss"], rel=0.05)
