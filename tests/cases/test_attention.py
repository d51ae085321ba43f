"""Attention that is written by hand: its MLPs shrink, and what cannot go stays with its reason."""

import json
from pathlib import Path

import pytest


@pytest.mark.slow
def test_transformers_with_attention_written_by_hand_are_compressed(case_file, heliostat):
    process = heliostat("run", case_file("attention/pipeline.yaml"), "--json")
    nodes = {node["name"]: node for node in json.loads(process.stdout)["nodes"]}
    assert {name: node["status"] for name, node in nodes.items()} == dict.fromkeys(nodes, "ran")
    for kind in ("apart", "packed", "bert"):
        smaller = nodes[f"smaller[{kind}]"]
        assert smaller["metrics"]["num_params"] < nodes[kind]["metrics"]["num_params"]
        pruned = json.loads(Path(smaller["path"], "record.json").read_text())["details"]["pruned"]
        assert {"blocks.0.up", "blocks.1.up"} <= pruned["channels_removed"].keys()
        projections = [name for name in pruned["kept"] if name.endswith((".q", ".k", ".v", ".packed"))]
        assert projections
        assert all(pruned["kept"].values())
    assert nodes["thin"]["metrics"]["num_params"] < nodes["bert"]["metrics"]["num_params"]
    assert nodes["int8"]["metrics"]["size_mb"] < nodes["bert"]["metrics"]["size_mb"]
