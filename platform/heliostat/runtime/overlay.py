"""The parameters of a trial, laid over a train config."""

from collections.abc import Mapping
from typing import Any

from heliostat.core.validate import validate
from heliostat.training.config import TrainConfig


def overlay(config: TrainConfig, params: Mapping[str, Any]) -> TrainConfig:
    """`config` with each dotted path of `params` set, as in `{"optimizer.lr": 0.1, "model_args.width": 8}`.

    Raises SpecError when the result is not a train config.
    """
    merged = config.model_dump(mode="json", exclude_unset=True)
    for path, value in params.items():
        *parents, leaf = path.split(".")
        place = merged
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = value
    return validate(TrainConfig, merged)
