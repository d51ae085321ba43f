"""The centres that a loss learns are saved with every model that comes of a training, and measured with it."""

import json

import pytest
import torch

import heliostat
from heliostat.core.load import load_pipeline


@pytest.mark.slow
def test_every_model_is_measured_with_the_loss_that_was_trained_with_it(case_file):
    result = heliostat.run(load_pipeline(case_file("loss_weights/pipeline.yaml")))
    nodes = {node.name: node for node in result.nodes}
    history = json.loads((nodes["train"].path / "record.json").read_text())["details"]["history"]
    assert min(row["val_loss"] for row in history) == pytest.approx(nodes["train"].metrics["val_loss"], rel=1e-5)
    assert nodes["train"].metrics["val_loss"] < 1.0  # 2.3 and more with centres at random
    states = {name: torch.load(node.path / "loss.pt", weights_only=True) for name, node in nodes.items()}
    assert torch.equal(states["exported"]["weight"], states["train"]["weight"])
    assert not torch.equal(states["pruned"]["weight"], states["train"]["weight"])
    assert torch.equal(states["int8"]["weight"], states["pruned"]["weight"])
    assert nodes["exported"].metrics["val_loss"] == pytest.approx(nodes["train"].metrics["val_loss"], rel=1e-4)
    assert nodes["int8"].metrics["val_loss"] == pytest.approx(nodes["pruned"].metrics["val_loss"], rel=0.1)
