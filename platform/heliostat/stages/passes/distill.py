"""The pass of `distill`."""

import logging
from collections.abc import Sequence

from heliostat.compression.distill import mean_outputs
from heliostat.compression.formats import load_model
from heliostat.compression.size import num_params
from heliostat.core.stage import StageResult, Validated
from heliostat.stages.distill import DistillConfig
from heliostat.stages.passes.teaching import taught_by
from heliostat.stages.passes.workshop import Source, Workshop
from heliostat.training.lazy import materialize
from heliostat.training.seeding import seed_everything
from heliostat.training.task import build_model

log = logging.getLogger(__name__)


def distill_model(shop: Workshop, teachers: Sequence[Source], config: DistillConfig) -> StageResult:
    """Train the student, whose recipe the workshop has, from scratch; several teachers are an ensemble."""
    seed_everything(shop.seed)
    task = shop.task.model_copy(update={"model": config.model}) if config.model else shop.task
    model = build_model(task, shop.recipe.model_args)
    materialize(model, lambda: shop.samples("train", 2))
    names = ", ".join(teacher.node for teacher in teachers)
    warnings = [
        f"the student is no smaller than {teacher.node}: {num_params(model)} of {num_params(teacher.folder)} parameters"
        for teacher in teachers
        if num_params(model) >= num_params(teacher.folder)
    ]
    for warning in warnings:
        log.warning("the student of %s: %s", names, warning)
    with taught_by(shop, teachers, config, student=model) as lesson:
        fitted = shop.fine_tune(model, shop.recipe, batch_loss=lesson.loss, data=lesson.data)
    files = shop.save(model.eval(), reference=config.model)
    teacher = mean_outputs([load_model(teacher.folder) for teacher in teachers])
    return StageResult(
        files=files,
        metrics=fitted.metrics,
        validated=Validated(fitted.metrics, fitted.layers),
        params={"train": shop.recipe.model_dump(mode="json", exclude_unset=True)},
        details={
            "best_epoch": fitted.epoch,
            "history": fitted.history,
            "warnings": warnings,
            **lesson.details,
            **fitted.notes,
            "parity": {
                "reload": shop.reload_parity(model),
                "source": shop.parity(teacher, against=names),
            },
        },
    )
