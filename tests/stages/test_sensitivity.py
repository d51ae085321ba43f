"""Scans of a model's layers: what the stages set by them, and what the record shows."""

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from itertools import count

import pytest
import torch

from heliostat.compression.formats import load_model
from heliostat.compression.size import num_params
from heliostat.errors import SpecError, StageError
from heliostat.stages.measure import measure_quality
from heliostat.stages.passes import scan
from heliostat.training.config import TrainConfig

LEVELS = (0.25, 0.5, 0.75)
ATTENTION = """


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 8)
        self.block = nn.TransformerEncoderLayer(8, 4, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        return self.head(self.block(self.first(x.view(-1, 4, 2))).flatten(1))
"""


@pytest.mark.parametrize("method", ["structured", "magnitude"])
def test_the_scan_spreads_a_sparsity_over_the_layers_by_what_they_cost_alone(bench, trained, method):
    config = {"method": method, "sparsity": 0.5, "sensitivity": {"levels": LEVELS}}
    pruned = bench.run("prune", config, model=trained)
    details = pruned.record.details
    layers = ["0", "2"] if method == "structured" else ["0", "2", "4"]
    assert [(row["layer"], row["sparsity"]) for row in details["sensitivity"]] == [
        (layer, level) for layer in layers for level in LEVELS
    ]
    assert all({"val_loss", "val_accuracy"} <= row.keys() for row in details["sensitivity"])
    sizes = dict.fromkeys(layers, 16) if method == "structured" else {"0": 128, "2": 256, "4": 48}
    spread = sum(sizes[layer] * sparsity for layer, sparsity in details["sparsities"].items()) / sum(sizes.values())
    assert spread == pytest.approx(0.5, abs=0.001)
    if method == "structured":
        removed = details["pruned"]["channels_removed"]
        assert removed == {layer: round(16 * sparsity) for layer, sparsity in details["sparsities"].items()}
        assert num_params(pruned.folder) < num_params(trained.folder)
    else:
        assert details["pruned"]["layers"] == pytest.approx(details["sparsities"], abs=0.02)


@pytest.mark.parametrize("method", ["structured", "magnitude"])
def test_the_scan_prunes_as_far_as_the_limit_allows_and_no_further(bench, trained, method):
    before = measure_quality(trained.folder, bench.task, trained.record.params)["val_accuracy"]
    reached = []
    for limit in (0.02, 0.2):
        config = {"method": method, "sensitivity": {"max_drop": {"val_accuracy": limit}}}
        pruned = bench.run("prune", config, model=trained)
        after = measure_quality(pruned.folder, bench.task, pruned.record.params)["val_accuracy"]
        assert before - after <= limit + 1e-6
        reached.append(sum(pruned.record.details["sparsities"].values()))
    assert 0 < reached[0] < reached[1]


@pytest.fixture
def attentive(bench):
    """The bench with a model of one block with attention of four heads, and the model after three epochs."""
    module = bench.root / "toy.py"
    module.write_text(module.read_text() + ATTENTION)
    attentive = replace(bench, task=bench.task.model_copy(update={"model": "toy:Attentive"}))
    return attentive, attentive.train(TrainConfig(epochs=3, optimizer={"lr": 0.01}))


@pytest.mark.parametrize("gradual_epochs", [0, 2])
def test_the_scan_takes_heads_from_attention_as_it_takes_channels_from_other_layers(attentive, gradual_epochs):
    bench, model = attentive
    config = {"sparsity": 0.5, "gradual_epochs": gradual_epochs, "sensitivity": {}, "importance": "taylor"}
    pruned = bench.run("prune", config, model=model)
    details, layers = pruned.record.details, ["block.self_attn", "block.linear1"]
    tried = [(row["layer"], row["sparsity"]) for row in details["sensitivity"]]
    assert tried == [(layers[0], level) for level in LEVELS] + [(layers[1], level) for level in (*LEVELS, 0.9)]
    heads, channels = (details["sparsities"][layer] for layer in layers)
    assert (8 * heads + 16 * channels) / 24 == pytest.approx(0.5, abs=0.001)
    assert details["pruned"].get("heads_left", {layers[0]: 4}) == {layers[0]: 4 - round(4 * heads)}
    assert details["pruned"]["channels_removed"][layers[1]] == round(16 * channels)
    assert details["parity"]["reload"]["max_abs_diff"] == 0


def test_heads_go_step_by_step_as_channels_do(attentive):
    bench, model = attentive
    pruned = bench.run("prune", {"sparsity": 0.5, "head_sparsity": 0.75, "gradual_epochs": 5}, model=model)
    history = json.loads((pruned.folder / "model.json").read_text())["history"]
    heads = [step["layers"]["block.self_attn"] for step in history if step["op"] == "heads"]
    assert [len(left) for left in heads] == [2, 1]
    assert pruned.record.details["pruned"]["heads_left"] == {"block.self_attn": 1}
    assert pruned.record.details["parity"]["reload"]["max_abs_diff"] == 0


@pytest.mark.parametrize("what", ["sparsity", "head_sparsity"])
def test_a_cut_that_leaves_a_layer_empty_is_refused_before_a_step_of_it_is_trained(attentive, what):
    bench, model = attentive
    with pytest.raises(SpecError, match=f"{what} 0.99 leaves"):
        bench.run("prune", {what: 0.99, "gradual_epochs": 50}, model=model)
    assert not list((bench.store / "prune").rglob("*.pt"))


def test_a_limit_that_no_cut_keeps_is_refused(bench, trained, monkeypatch):
    worse_and_worse = count()
    monkeypatch.setattr(scan, "evaluate", lambda *args, **more: {"val_loss": next(worse_and_worse)})
    with pytest.raises(StageError, match=re.escape("within max_drop (val_loss 0.5) before fine-tuning")):
        bench.run("prune", {"sensitivity": {"max_drop": {"val_loss": 0.5}}}, model=trained)


@pytest.mark.parametrize("importance", ["magnitude", "taylor"])
def test_channels_go_step_by_step_and_the_network_is_rebuilt_from_its_history(bench, trained, importance):
    config = {"sparsity": 0.75, "gradual_epochs": 3, "finetune_epochs": 1, "importance": importance}
    pruned = bench.run("prune", config, model=trained)
    assert pruned.record.details["pruned"]["channels_removed"] == {"0": 12, "2": 12}
    assert len(pruned.record.details["history"]) == 4
    assert pruned.record.details["parity"]["reload"]["max_abs_diff"] == 0
    assert torch.load(pruned.folder / "weights.pt", weights_only=True)["2.weight"].shape == (4, 4)
    assert load_model(pruned.folder)(torch.randn(5, 8)).shape == (5, 3)


@pytest.mark.parametrize("epoch", [2, 5], ids=["while channels go", "while the network is mended"])
def test_step_by_step_goes_on_after_the_process_was_killed(bench, trained, monkeypatch, epoch):
    def prune(on_epoch):
        reporter = type(bench.context("prune").reporter)
        monkeypatch.setattr(reporter, "metrics", lambda _, values, step, **more: on_epoch(step))
        config = {"sparsity": 0.75, "gradual_epochs": 3, "finetune_epochs": 3}
        return torch.load(bench.run("prune", config, model=trained).folder / "weights.pt", weights_only=True)

    whole = prune(lambda step: None)
    shutil.rmtree(bench.store / "prune")
    if not (child := os.fork()):
        torch.set_num_threads(1)  # the threads of the parent are not there
        prune(lambda step: step == epoch and os.kill(os.getpid(), signal.SIGKILL))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

    told = []
    again = prune(told.append)
    assert told in (list(range(epoch, 7)), list(range(epoch - 1, 7)))  # a checkpoint may still have been on its way
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_step_by_step_each_layer_goes_as_far_as_the_scan_says(bench, trained):
    config = {"sparsity": 0.5, "gradual_epochs": 2, "sensitivity": {}}
    details = bench.run("prune", config, model=trained).record.details
    removed = {layer: round(16 * sparsity) for layer, sparsity in details["sparsities"].items()}
    assert details["pruned"]["channels_removed"] == removed


def test_a_run_whose_stages_hold_every_cpu_starts_tasks_in_them_and_shows_the_tables(toy, heliostat):
    document = toy.document
    below = {"inputs": {"model": "train"}}
    calibration = {"calibration": "percentile", "calibration_split": "val"}
    document["stages"] = [
        {"name": "train", "uses": "train", "config": {"epochs": 1}},
        {"name": "prune", "uses": "prune", **below, "config": {"sensitivity": {}}},
        {"name": "int8", "uses": "quantize", **below, "config": {"max_drop": {"val_loss": 0.001}, **calibration}},
        {"name": "nas", "uses": "nas", "config": {"elastic": {"model_args.width": [4, 8, 16]}, "epochs": 1}},
    ]
    toy.write(document)
    done = heliostat("run", toy.file, "--json")
    assert done.returncode == 0, done.stderr
    tables = {node: heliostat("show", node, "--storage", toy.folder / ".heliostat").stdout for node in ("prune", "nas")}
    assert "sensitivity: what each layer alone costs" in tables["prune"]
    assert "subnets" in tables["nas"]
