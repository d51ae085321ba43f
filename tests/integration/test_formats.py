"""One model in several formats, in one run."""

import json
from pathlib import Path

import pytest
import torch

import heliostat as public


@pytest.mark.slow
def test_a_matrix_of_formats_is_exported_measured_together_chosen_from_and_tracked(toy, heliostat):
    import mlflow

    stages = [
        {"name": "train", "uses": "train", "config": {"epochs": 2}},
        {"name": "files", "uses": "export", "inputs": {"model": "train"}, "matrix": {"format": ["onnx", "pt2"]}},
        {
            "name": "int8",
            "uses": "quantize",
            "inputs": {"model": "train"},
            "matrix": {"backend": ["onnxruntime", "torchao"]},
        },
        {
            "name": "fastest",
            "uses": "select",
            "inputs": {"baseline": "train", "candidates": ["train", "files", "int8"]},
            "config": {"minimize": ["latency_ms"]},
        },
    ]
    done = heliostat("run", toy.write({**toy.document, "stages": stages}), "--json")
    assert done.returncode == 0, done.stderr
    nodes = {node["name"]: node for node in json.loads(done.stdout)["nodes"]}
    record = json.loads((Path(nodes["fastest"]["path"]) / "record.json").read_text())
    rows = {row["model"]: row for row in record["details"]["table"]}
    files, graph = {"files[format=onnx]", "files[format=pt2]", "int8[backend=onnxruntime]"}, "int8[backend=torchao]"
    assert rows.keys() == {"train", graph} | files
    fastest = min(rows.values(), key=lambda row: row["metrics"]["latency_ms"])
    assert fastest["metrics"]["latency_ms"] > 0
    assert fastest["model"] == record["details"]["chosen"]
    for path in (nodes[graph]["path"], nodes["fastest"]["path"]):
        assert public.load_model(path, trust_code=True)(torch.randn(3, 8)).shape == (3, 3)
    slower = json.loads((Path(nodes[graph]["path"]) / "record.json").read_text())["details"]["speed"]
    assert slower["speedup"] > 1.05 or "torch runs the graph as it is written" in slower["why_not_faster"]

    mlflow.set_tracking_uri(record["tracking"]["uri"])
    logged = mlflow.pyfunc.load_model(f"runs:/{record['tracking']['run_id']}/model")
    (answer,) = logged.metadata.signature.outputs
    assert answer.shape == (-1, 3)
