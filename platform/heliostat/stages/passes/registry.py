"""Every pass by the name of the stage that does the same."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from heliostat.core.stage import StageResult
from heliostat.stages.distill import DistillConfig, student_config
from heliostat.stages.passes.distill import distill_model
from heliostat.stages.passes.factorize import factorize_model
from heliostat.stages.passes.prune import prune_model
from heliostat.stages.passes.quantize import quantize_model
from heliostat.stages.passes.workshop import Source, Workshop
from heliostat.training.task import build_data


def _distilled(shop: Workshop, source: Source, config: DistillConfig) -> StageResult:
    recipe = student_config(shop.recipe, config)
    data = build_data(shop.task, recipe.data_args) if config.data_args else shop.data
    return distill_model(replace(shop, recipe=recipe, data=data), [shop.teacher or source], config)


PASSES: dict[str, Callable[[Workshop, Any, Any], StageResult]] = {
    "prune": prune_model,
    "factorize": factorize_model,
    "distill": _distilled,
    "quantize": quantize_model,
}
