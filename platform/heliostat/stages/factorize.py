"""`factorize`: low-rank layers in place of full ones, then fine-tuning."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated

from pydantic import Field, model_validator

from heliostat.core.model import Count, Number
from heliostat.core.stage import ConfigView, StageContext, StageResult, stage
from heliostat.stages.checks import check_trainable
from heliostat.stages.finetuning import FineTuning, check_tuning, params_used


class FactorizeConfig(FineTuning):
    """Linear layers and convolutions become two thin ones each, where that makes them smaller."""

    energy: Annotated[Number, Field(gt=0, le=1)] = 0.9
    """How much of each layer's squared singular values to keep; its rank follows."""
    rank: Count | None = None
    """One rank for every layer, instead."""
    skip: tuple[str, ...] = ()
    """Patterns of layer names to leave alone, such as `stem.*`."""

    @model_validator(mode="after")
    def _one_of_two(self) -> "FactorizeConfig":
        if self.rank is not None and "energy" in self.model_fields_set:
            raise ValueError("rank and energy: give one of them")
        return self


def _check(config: FactorizeConfig, view: ConfigView) -> Iterator[str]:
    yield from check_trainable(view, slot="model")
    yield from check_tuning(config, view)


@stage(
    "factorize",
    inputs={"model": "model"},
    output="model",
    version=2,
    measured="later",
    workload=lambda config: {"epochs": config.finetune_epochs},
    check=_check,
    params_used=params_used,
)
def factorize(context: StageContext, config: FactorizeConfig) -> StageResult:
    """Factorize the model in the slot `model`, fine-tune it, and keep the ranks as a history that can be replayed."""
    from heliostat.stages.models import train_config_of, workshop_of
    from heliostat.stages.passes.factorize import factorize_model

    source = context.one("model")
    thin = factorize_model(workshop_of(context, train_config_of(source)), source, config)
    return replace(thin, params=source.record.params)
