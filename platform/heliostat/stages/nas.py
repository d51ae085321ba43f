"""`nas`: train all sub-networks of a user's model at once, with shared weights, and keep the one that pays best."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial, reduce
from typing import Annotated, Any

from pydantic import Field, field_validator

from heliostat.core.artifact import Record
from heliostat.core.model import Count, Integer, NonNegative, NonNegativeInt, Number, Positive
from heliostat.core.paths import without
from heliostat.core.stage import ConfigView, StageContext, StageResult, stage
from heliostat.stages.checks import (
    check_arguments,
    check_loop,
    check_metric,
    check_monitor,
    check_own_loss,
    check_searched,
)
from heliostat.stages.finetuning import SoftLoss
from heliostat.training.config import TrainConfig


class NasConfig(TrainConfig):
    """A train config for the largest network, and what may be smaller.

    The winner of the search is the fastest network within `max_drop` of the largest one, or without that the best.
    """

    elastic: dict[str, tuple[Any, ...]] = Field(min_length=1)
    """Arguments of the model, each with its values from small to large: `model_args.width: [8, 16, 32]`."""
    subnets_per_batch: Annotated[Integer, Field(ge=2)] = 4
    """The largest, the smallest, and others at random (the sandwich rule)."""
    temperature: Positive = 1.0
    """Divides the outputs of the largest network before the others learn from them."""
    alpha: Annotated[Number, Field(ge=0, le=1)] = 1.0
    """The weight of the largest network's outputs in what the others learn from; the rest is that of the targets."""
    loss: SoftLoss = "auto"
    """How their outputs are compared with the largest network's, as in `distill`."""
    trials: Count = 64
    """So many sub-networks are measured; all of them, if there are no more."""
    max_drop: dict[str, NonNegative] = Field(default_factory=dict)
    """By how much the metrics of `val` may be worse than the largest network's, before `finetune_epochs`."""
    finetune_epochs: NonNegativeInt = 0
    """Of the winner, by itself."""

    @field_validator("elastic")
    @classmethod
    def _can_vary(cls, elastic: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        for path, values in elastic.items():
            if not path.startswith("model_args."):
                raise ValueError(f"{path!r} is no argument of the model; write it as 'model_args.{path}'")
            if len(values) < 2:
                raise ValueError(f"{path}: {list(values)} leaves no choice; name two values or more")
        return elastic


def _check(config: NasConfig, view: ConfigView) -> Iterator[str]:
    unknown = list(check_searched(config.elastic, view, place="config.elastic"))
    yield from unknown
    yield from check_arguments(
        config, view, place="config", more=() if unknown else config.elastic, partial=bool(unknown)
    )
    yield from check_monitor(config, view, place="config")
    yield from check_loop(config, view, place="config", workers=1)
    yield from check_own_loss(view, place="config", learns="sub-networks learn from the largest")
    for metric in config.max_drop:
        yield from check_metric(metric, view, place=f"config.max_drop.{metric}", splits=("val",))


def _params_used(config: NasConfig, inputs: Mapping[str, Sequence[Record]]) -> Mapping[str, Any]:
    """Of what is elastic there is no one value."""
    return reduce(without, config.elastic, config.model_dump(mode="json"))


@stage(
    "nas",
    output="model",
    measured="later",
    workload=lambda config: {"epochs": config.epochs + config.finetune_epochs, "trials": config.trials},
    check=_check,
    params_used=_params_used,
)
def nas(context: StageContext, config: NasConfig) -> StageResult:
    """Train the network with its sub-networks, search among them, and keep the winner as an ordinary model."""
    from heliostat.runtime.side_by_side import alone
    from heliostat.stages.models import workshop_of
    from heliostat.stages.passes.nas import search_architecture

    recipe = TrainConfig.model_validate(config.model_dump(include=set(TrainConfig.model_fields), exclude_unset=True))
    shop = workshop_of(context, recipe)
    return search_architecture(shop, config, alone=partial(alone, root=context.root, retries=context.retries))
