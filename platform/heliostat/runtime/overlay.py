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


def data_args(config: TrainConfig, params: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the data function will be given, whatever else of the parameters makes a train config or does not."""
    mine = {path: value for path, value in params.items() if path.startswith("data_args.")}
    return overlay(TrainConfig(data_args=config.data_args), mine).data_args
