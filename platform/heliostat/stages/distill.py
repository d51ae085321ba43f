"""`distill`: train a smaller student on a teacher's soft outputs (Hinton et al. 2015, https://arxiv.org/abs/1503.02531)."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from heliostat.core.model import Number, Positive
from heliostat.core.stage import ConfigView, StageContext, StageResult, stage
from heliostat.stages.checks import check_arguments, check_loop, check_monitor
from heliostat.training.config import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor

    from heliostat.training.batches import Batch
    from heliostat.training.task import Data

TEACHER_BATCH_SIZE = 256


class DistillConfig(TrainConfig):
    """A train config for the student. Its `model_args` change the teacher's; all else is the student's own."""

    temperature: Positive = 4.0
    """Divides the logits of both before they are compared: the higher, the more the small ones count."""
    alpha: Annotated[Number, Field(ge=0, le=1)] = 0.7
    """The weight of the teacher's outputs; the rest is the weight of the true targets."""


def _check(config: DistillConfig, view: ConfigView) -> Iterator[str]:
    yield from check_arguments(config, view, place="config", partial=True)
    yield from check_monitor(config, view, place="config")
    yield from check_loop(config, view, place="config", workers=1)


@stage(
    "distill",
    inputs={"teacher": "model"},
    output="model",
    measured="later",
    workload=lambda config: {"epochs": config.epochs},
    check=_check,
)
def distill(context: StageContext, config: DistillConfig) -> StageResult:
    """Train the student from scratch. The teacher's outputs are computed once where the inputs are tensors."""
    from heliostat.compression.distill import distillation_loss
    from heliostat.compression.formats import load_model
    from heliostat.stages.models import fine_tune, parity, save_trained, train_config_of
    from heliostat.training.seeding import seed_everything
    from heliostat.training.task import build_data, build_model, build_objective

    source = context.one("teacher")
    recipe = train_config_of(source)
    model_args = {**recipe.model_args, **config.model_args}
    data_args = config.data_args or recipe.data_args
    own = config.model_dump(exclude={"temperature", "alpha"}, exclude_unset=True)
    student = TrainConfig.model_validate({**own, "model_args": model_args, "data_args": data_args})
    teacher = load_model(source.folder)
    loss = build_objective(context.task).loss

    def batch_loss(outputs: "Tensor", batch: "Batch") -> "Tensor":
        soft = batch[2] if len(batch) > 2 else teacher(batch[0])
        return distillation_loss(outputs, soft, batch[1], loss=loss, temperature=config.temperature, alpha=config.alpha)

    seed_everything(context.seed)
    model = build_model(context.task, student.model_args)
    data = _with_teacher(build_data(context.task, student.data_args), teacher)
    fitted = fine_tune(context, model, student, batch_loss=batch_loss, data=data)
    files = save_trained(context, model.eval(), config=student)
    return StageResult(
        files=files,
        metrics=fitted.metrics,
        params={"train": student.model_dump(mode="json", exclude_unset=True)},
        details={
            "best_epoch": fitted.epoch,
            "history": fitted.history,
            "parity": {
                "reload": parity(context, student, model, against="the model before saving"),
                "source": parity(context, student, teacher, against=source.node),
            },
        },
    )


def _with_teacher(data: "Data", teacher: Any) -> "Data":
    """The training split with the teacher's outputs as a third tensor, if it is tensors; else as it is."""
    from torch.utils.data import TensorDataset

    from heliostat.compression.distill import teacher_outputs

    train = data["train"]
    if not isinstance(train, TensorDataset):
        return data
    inputs, targets = train.tensors[:2]
    return {**data, "train": TensorDataset(inputs, targets, teacher_outputs(teacher, inputs, TEACHER_BATCH_SIZE))}
