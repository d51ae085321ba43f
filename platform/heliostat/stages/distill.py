"""`distill`: train a smaller student on a teacher's soft outputs (Hinton et al. 2015, https://arxiv.org/abs/1503.02531)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from heliostat.core.artifact import Record
from heliostat.core.imports import resolve, why_not_callable
from heliostat.core.spec import Reference
from heliostat.core.stage import ConfigView, StageContext, StageResult, stage
from heliostat.stages.checks import UNTRAINABLE, check_arguments, check_loop, check_monitor, check_own_loss
from heliostat.stages.finetuning import SoftTargets
from heliostat.stages.measure import recipe_of
from heliostat.training.config import TrainConfig


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
    yield from check_own_loss(view, place="config", learns="a student learns")
    if config.features:
        teachers = [kind.name for kind, _ in view.inputs["teacher"]]
        if len(teachers) > 1:
            yield f"config.features: layers are matched with those of one teacher, not of {len(teachers)}"
        elif teachers[0] in UNTRAINABLE:
            yield f"config.features: what {teachers[0]!r} makes has no layers to match; name the stage before it"
    yield from _check_outputs(config, view)


def _check_outputs(config: DistillConfig, view: ConfigView) -> Iterator[str]:
    """Whether teachers and student end in as many outputs, where their model functions tell without any data."""
    known = [upstream for kind, upstream in view.inputs["teacher"] if kind.name == "train"]
    if len(known) < len(view.inputs["teacher"]):
        return  # what another stage makes of which model is not in its config
    from heliostat.compression.layers import num_outputs
    from heliostat.training.strategies.forecast import on_meta

    def outputs_of(function: Callable[..., Any], trained: TrainConfig) -> int | None:
        model = on_meta(function, trained)
        return None if isinstance(model, str) else num_outputs(model)

    teachers = [upstream for upstream in known if isinstance(upstream, TrainConfig)]
    model_args = config.model_args if config.model else {**teachers[0].model_args, **config.model_args}
    constructor = resolve(config.model) if config.model else view.functions["model"]
    own = outputs_of(constructor, TrainConfig(model_args=model_args))
    for teacher in teachers:
        theirs = outputs_of(view.functions["model"], teacher)
        if own is not None and theirs is not None and own != theirs:
            yield f"config.model_args: the student ends in {own} outputs, its teacher in {theirs}; both need as many"
            return


def student_config(teacher: TrainConfig, config: DistillConfig) -> TrainConfig:
    """How the student is trained, `teacher` being how the (first) teacher was."""
    model_args = config.model_args if config.model else {**teacher.model_args, **config.model_args}
    own = config.model_dump(exclude={"model", *SoftTargets.model_fields}, exclude_unset=True)
    data_args = config.data_args or teacher.data_args
    return TrainConfig.model_validate({**own, "model_args": model_args, "data_args": data_args})


def _params_used(config: DistillConfig, inputs: Mapping[str, Sequence[Record]]) -> Mapping[str, Any]:
    recipe = student_config(recipe_of(inputs["teacher"][0].params), config)
    return {**config.model_dump(mode="json"), **recipe.model_dump(mode="json")}


@stage(
    "distill",
    inputs={"teacher": "model*"},
    output="model",
    version=2,
    measured="later",
    workload=lambda config: {"epochs": config.epochs},
    check=_check,
    params_used=_params_used,
)
def distill(context: StageContext, config: DistillConfig) -> StageResult:
    """Train the student from scratch; several teachers are an ensemble."""
    from heliostat.stages.models import train_config_of, workshop_of
    from heliostat.stages.passes.distill import distill_model

    teachers = context.inputs["teacher"]
    recipe = student_config(train_config_of(teachers[0]), config)
    return distill_model(workshop_of(context, recipe), teachers, config)
