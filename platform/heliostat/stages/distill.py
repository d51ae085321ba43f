"""`distill`: train a smaller student on a teacher's soft outputs (Hinton et al. 2015, https://arxiv.org/abs/1503.02531)."""

import logging
from collections.abc import Iterator

from heliostat.core.imports import resolve, why_not_callable
from heliostat.core.spec import Reference
from heliostat.core.stage import ConfigView, StageContext, StageResult, stage
from heliostat.stages.checks import UNTRAINABLE, check_arguments, check_loop, check_monitor
from heliostat.stages.finetuning import SoftTargets, taught_by
from heliostat.training.config import TrainConfig

log = logging.getLogger(__name__)


class DistillConfig(SoftTargets, TrainConfig):
    """A train config for the student. Its `model_args` change the teacher's; all else is the student's own."""

    model: Reference | None = None
    """Another constructor than `task.model`; `model_args` are then all of its arguments."""

    @property
    def code_references(self) -> tuple[str, ...]:
        return (*super().code_references, *((self.model,) if self.model else ()))


def _check(config: DistillConfig, view: ConfigView) -> Iterator[str]:
    if config.model is None:
        yield from check_arguments(config, view, place="config", partial=True)
    else:
        problem = why_not_callable(resolve(config.model), config.model_args)
        if problem:
            yield f"config.model_args: {config.model!r} {problem}"
    yield from check_monitor(config, view, place="config")
    yield from check_loop(config, view, place="config", workers=1)
    if config.features:
        teachers = [kind.name for kind, _ in view.inputs["teacher"]]
        if len(teachers) > 1:
            yield f"config.features: layers are matched with those of one teacher, not of {len(teachers)}"
        elif teachers[0] in UNTRAINABLE:
            yield f"config.features: what {teachers[0]!r} makes has no layers to match; name the stage before it"


@stage(
    "distill",
    inputs={"teacher": "model*"},
    output="model",
    version=2,
    measured="later",
    workload=lambda config: {"epochs": config.epochs},
    check=_check,
)
def distill(context: StageContext, config: DistillConfig) -> StageResult:
    """Train the student from scratch; several teachers are an ensemble."""
    from heliostat.compression.distill import mean_outputs
    from heliostat.compression.formats import load_model
    from heliostat.compression.size import num_params
    from heliostat.stages.models import fine_tune, parity, reload_parity, save_trained, train_config_of
    from heliostat.training.seeding import seed_everything
    from heliostat.training.task import build_data, build_model

    teachers = context.inputs["teacher"]
    recipe = train_config_of(teachers[0])
    model_args = config.model_args if config.model else {**recipe.model_args, **config.model_args}
    data_args = config.data_args or recipe.data_args
    own = config.model_dump(exclude={"model", *SoftTargets.model_fields}, exclude_unset=True)
    student = TrainConfig.model_validate({**own, "model_args": model_args, "data_args": data_args})

    seed_everything(context.seed)
    task = context.task.model_copy(update={"model": config.model}) if config.model else context.task
    model = build_model(task, student.model_args)
    warnings = [
        f"the student is no smaller than {teacher.node}: {num_params(model)} of {num_params(teacher.folder)} parameters"
        for teacher in teachers
        if num_params(model) >= num_params(teacher.folder)
    ]
    for warning in warnings:
        log.warning("%s: %s", context.node, warning)
    data = build_data(context.task, student.data_args)
    with taught_by(teachers, config, task=context.task, student=model, data=data) as (batch_loss, taught):
        fitted = fine_tune(context, model, student, batch_loss=batch_loss, data=taught)
    files = save_trained(context, model.eval(), config=student, reference=config.model)
    teacher = mean_outputs([load_model(teacher.folder) for teacher in teachers])
    return StageResult(
        files=files,
        metrics=fitted.metrics,
        params={"train": student.model_dump(mode="json", exclude_unset=True)},
        details={
            "best_epoch": fitted.epoch,
            "history": fitted.history,
            "warnings": warnings,
            "parity": {
                "reload": reload_parity(context, student, model),
                "source": parity(context, student, teacher, against=", ".join(t.node for t in teachers)),
            },
        },
    )
