"""Whole steps of a range are whole numbers for the model and for the config, whichever engine suggests them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from heliostat.core.imports import use_root
from heliostat.core.load import load_pipeline
from heliostat.core.paths import overlay
from heliostat.core.space import Space
from heliostat.runtime.engines import engines
from heliostat.training.config import TrainConfig
from heliostat.training.run import run_training
from heliostat.training.world import World


@pytest.mark.parametrize("algorithm", list(engines()))
def test_a_suggested_width_and_batch_size_train(algorithm: str, case_file: Callable[[str], Path]) -> None:
    file = case_file("quniform/pipeline.yaml")
    use_root(file.parent)
    pipeline = load_pipeline(file)
    config = pipeline.stages[0].config
    engine = engines()[algorithm].make(Space.parse(config["space"]), num_objectives=1, seed=0, trials=2)
    point = engine.suggest("0")
    assert point is not None
    train = overlay(TrainConfig.model_validate(config["train"]), point, place="the search")
    assert type(train.model_args["width"]) is type(train.batch_size) is int
    assert run_training(pipeline.task, train, world=World(), seed=0).epochs == 1
