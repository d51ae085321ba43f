"""A mean over tokens is exact in parts and on several workers as a sum and its weight, and refused as a mean."""

import json

import pytest
import torch

import heliostat
from heliostat.core.load import load_pipeline
from heliostat.errors import StageError
from heliostat.runner import plan


def test_a_mean_over_tokens_is_refused_in_parts_and_trains_as_sum_and_weight(train_stages):
    with pytest.raises(StageError, match=r"task\.loss: the loss is no mean over samples \(.* from its 4 parts\)"):
        train_stages("tokenmean/pipeline.yaml", ["in_parts"])
    fits = train_stages("tokenmean/sums.yaml", ["whole", "in_parts"])
    for row, expected in zip(fits["in_parts"].history, fits["whole"].history, strict=True):
        assert row["train_loss"] == pytest.approx(expected["train_loss"], abs=1e-5)
        assert row["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-5)
    mean = train_stages("tokenmean/pipeline.yaml", ["whole"])["whole"]
    torch.testing.assert_close(mean.state, fits["whole"].state, rtol=0, atol=1e-5)


def test_the_plan_says_what_the_loss_must_be_where_batches_are_split(case_file):
    made = plan(load_pipeline(case_file("tokenmean/pipeline.yaml")))
    assert "split_loss" not in made.node("whole").explained
    assert "must be a mean over samples or (sum, weight)" in made.node("in_parts").explained["split_loss"]
    assert "split_loss" in made.node("two_workers").explained


@pytest.mark.slow
def test_the_record_of_two_workers_has_the_figures_of_one(case_file):
    result = heliostat.run(load_pipeline(case_file("tokenmean/sums.yaml")))
    histories = {}
    for node in result.nodes:
        record = json.loads((node.path / "record.json").read_text())
        histories[node.name] = record["details"]["history"]
        best = record["details"]["best_epoch"] - 1
        assert record["metrics"]["val_loss"] == pytest.approx(histories[node.name][best]["val_loss"], rel=1e-6)
    for name in ("in_parts", "two_workers"):
        for row, expected in zip(histories[name], histories["whole"], strict=True):
            assert row["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-4)
    refused = heliostat.run(load_pipeline(case_file("tokenmean/pipeline.yaml")))
    assert {node.name: node.status for node in refused.nodes} == {
        "whole": "ran",
        "in_parts": "failed",
        "two_workers": "failed",
    }
