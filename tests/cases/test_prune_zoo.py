"""Networks with channels that are coupled in unusual ways: what can go goes, the rest stays, with the reason."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from heliostat.compression.history import replay
from heliostat.compression.prune.masked import masked
from heliostat.compression.prune.steps import cut
from heliostat.compression.prune.structured import structured, widths


@pytest.fixture(scope="module")
def zoo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prune_zoo_task", Path(__file__).parent / "prune_zoo/task.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


A, B, C = ("a", 11), ("b", 11), ("c", 11)
LEFT = {
    "cbam": ((A, C), {"b", "gate"}),
    "attention_gate": ((A, B, C, ("squeeze", 5)), {"psi"}),
    "squeeze_excite": ((A, B, C, ("down", 2), ("up", 11)), set()),
    "masked_input": ((A, B, C), set()),
    "pixel_shuffle": ((A, B, C), {"up"}),
    "decoder": ((A, ("up", 11)), {"wide"}),
    "space_to_depth": ((A, C), {"b"}),
    "depthwise_multiplier": ((A, C), {"b", "depthwise"}),
    "depthwise": ((A, B, C, ("depthwise", 11)), set()),
    "group_norm": ((A, ("b", 12), C), set()),
    "group_norm_of_each": ((A, B, C), set()),
    "group_norm_of_halves": ((A, C), {"b"}),
    "channel_shuffle": ((A, C), {"b"}),
    "layer_scale": ((A, B, C), set()),
    "position_map": ((A, C), {"b"}),
    "auxiliary_head": ((A, B, C), {"auxiliary"}),
}
"""The widths of the layers that are cut from 16, and the other layers that are left alone."""


def _width(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


@pytest.mark.parametrize("kind", LEFT)
def test_what_can_go_goes_and_the_cut_network_is_the_masked_one(zoo, kind):
    torch.manual_seed(0)
    model, rows = zoo.build_model(kind).eval(), zoo.images(8, 0).tensors[0]
    smaller, (step,) = structured(model, example=rows, sparsity=0.3)
    cut_layers, kept = LEFT[kind]
    assert {name: _width(smaller.get_submodule(name)) for name, _ in cut_layers} == dict(cut_layers)
    assert step["kept"].keys() == kept | {"head"}

    _, positions = cut(model, step)
    assert torch.allclose(smaller(rows), masked(model, positions)(rows), atol=1e-5)
    assert smaller.train()(rows).shape == (8, 4)
    rebuilt = replay(zoo.build_model(kind), json.loads(json.dumps([step])))
    rebuilt.load_state_dict(smaller.state_dict())
    assert torch.equal(rebuilt.eval()(rows), smaller.eval()(rows))


@pytest.mark.parametrize("kind", ["channel_shuffle", "group_norm", "cbam", "position_map", "auxiliary_head"])
def test_a_scan_is_offered_the_layers_that_a_cut_takes_channels_from(zoo, kind):
    torch.manual_seed(0)
    model, rows = zoo.build_model(kind).eval(), zoo.images(8, 0).tensors[0]
    _, (step,) = structured(model, example=rows, sparsity=0.3)
    assert widths(model, example=rows).keys() == {name for name, _, _ in step["groups"]}


def test_the_reason_why_a_layer_was_left_alone_is_in_the_record_and_on_the_terminal(case_file, heliostat):
    process = heliostat("run", case_file("prune_zoo/pipeline.yaml"), "--json")
    nodes = {node["name"]: node for node in json.loads(process.stdout)["nodes"]}
    assert {node["status"] for node in nodes.values()} == {"ran"}
    (shuffled,) = (node for name, node in nodes.items() if name.startswith("prune") and "channel_shuffle" in name)
    pruned = json.loads(Path(shuffled["path"], "record.json").read_text())["details"]["pruned"]
    assert pruned["channels_removed"] == {"a": 5, "c": 5}
    assert "does not run with fewer channels" in pruned["kept"]["b"]
    shown = heliostat("show", shuffled["name"], "--storage", Path(shuffled["path"]).parents[2]).stdout
    assert "does not run with fewer channels" in " ".join(shown.split())
