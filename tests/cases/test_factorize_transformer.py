"""torch's encoder layers are factorized: their MLPs in two factors, what reads a weight itself left alone."""

import json
from pathlib import Path

import pytest


@pytest.mark.slow
def test_encoder_layers_are_factorized_fine_tuned_and_quantized(case_file, heliostat):
    process = heliostat("run", case_file("factorize_transformer/pipeline.yaml"), "--json")
    nodes = {node["name"]: node for node in json.loads(process.stdout)["nodes"]}
    assert {name: node["status"] for name, node in nodes.items()} == dict.fromkeys(nodes, "ran")
    for norm_first in ("False", "True"):
        train = f"train[model_args.norm_first={norm_first}]"
        thin = nodes[f"thin[{train}]"]
        assert thin["metrics"]["num_params"] < 0.8 * nodes[train]["metrics"]["num_params"]
        factorized = json.loads(Path(thin["path"], "record.json").read_text())["details"]["factorized"]
        assert {f"encoder.layers.{layer}.linear1" for layer in (0, 1)} <= factorized["ranks"].keys()
