"""Samples and outputs that are not one tensor each are refused before the first epoch, and by a search once."""

import json

import pytest

import heliostat
from heliostat.core.imports import use_root
from heliostat.core.load import load_pipeline
from heliostat.errors import StageError
from heliostat.training.config import TrainConfig
from heliostat.training.run import run_training
from heliostat.training.world import World

REFUSED = {
    "bert": r"inputs: \{input_ids: int64 \(16,\), attention_mask: int64 \(16,\)\}; they must be one tensor",
    "gru": r"inputs: \(int64 \(16,\), int\); they must be one tensor",
    "towers": r"inputs: \(int, int\); they must be one tensor",
    "towers_t": r"inputs: \(int64 \(\), int64 \(\)\); they must be one tensor",
    "two_images": r"inputs: \(float32 \(4,\), float32 \(4,\)\); they must be one tensor",
    "outputs": r"the model gives \{loss: None, logits: float32 \(4, 3\)\}; it must give one tensor",
}


@pytest.fixture
def train(case_file):
    """Train a stage of the case in this process; each epoch that ends is noted in the list."""
    file = case_file("inputs/pipeline.yaml")
    use_root(file.parent)
    pipeline = load_pipeline(file)
    configs = {s.name: TrainConfig.model_validate(s.config) for s in pipeline.stages if s.uses == "train"}

    def run(name, epochs):
        def on_epoch(epoch, row):
            epochs.append(epoch)

        return run_training(pipeline.task, configs[name], world=World(), seed=0, on_epoch=on_epoch)

    return run


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_one_tensor_is_refused_before_the_first_epoch(train, name):
    epochs = []
    with pytest.raises(StageError, match=REFUSED[name]):
        train(name, epochs)
    assert not epochs


def test_a_sample_may_have_more_than_inputs_and_targets(train):
    epochs = []
    train("extras", epochs)
    assert epochs == [1, 2]


@pytest.mark.slow
def test_a_run_refuses_each_of_them_and_the_search_in_its_first_trial(case_file):
    file = case_file("inputs/pipeline.yaml")
    result = heliostat.run(load_pipeline(file))
    status = {node.name: node.status for node in result.nodes}
    assert status == {**dict.fromkeys((*REFUSED, "search"), "failed"), "extras": "ran"}
    (journal,) = (file.parent / ".heliostat").rglob("search/*/journal.jsonl")
    assert [json.loads(line)["event"] for line in journal.read_text().splitlines()].count("ended") == 0
