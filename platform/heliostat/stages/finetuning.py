"""How stages that change a trained model train it on, and from what it may learn while they do."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from heliostat.core.model import Count, NonNegative, NonNegativeInt, Number, Positive, Spec
from heliostat.core.spec import Task
from heliostat.core.stage import ConfigView, StageResult
from heliostat.errors import StageError
from heliostat.stages.checks import check_loop, check_own_loss
from heliostat.training.config import OptimizerConfig, SchedulerConfig, TrainConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from heliostat.stages.passes.workshop import Source, Workshop
    from heliostat.training.batches import Batch
    from heliostat.training.task import Data

    Lesson = tuple[Callable[[Tensor, Batch], Tensor] | None, Data]

TEACHER_BATCH_SIZE = 256


class SoftTargets(Spec):
    """Learning from a teacher's outputs, and from what its layers make of the data, beside the true targets."""

    temperature: Positive = 4.0
    """Divides the logits of both before they are compared: the higher, the more the small ones count."""
    alpha: Annotated[Number, Field(ge=0, le=1)] = 0.7
    """The weight of the teacher's outputs; the rest is the weight of the true targets."""
    features: dict[str, str] = Field(default_factory=dict)
    """Layers of the student, each with the layer of the teacher whose features it should tell apart alike."""
    feature_weight: NonNegative = 1.0
    """The weight of each such pair beside the two above."""


class FineTuning(Spec):
    """Training on, by the recipe that the model was trained with but for what is said here."""

    finetune_epochs: NonNegativeInt = 0
    batch_size: Count | None = None
    optimizer: OptimizerConfig | None = None
    scheduler: SchedulerConfig = SchedulerConfig(name="cosine")
    distillation: SoftTargets | None = None
    """Learn from the model as it came in, too: an empty mapping takes the defaults."""

    @property
    def code_references(self) -> tuple[str, ...]:
        return self.optimizer.code_references if self.optimizer else ()

    def changed(self, recipe: TrainConfig, *, epochs: int, scheduler: SchedulerConfig) -> TrainConfig:
        """The recipe for one training of a stage."""
        own = {name: value for name in ("batch_size", "optimizer") if (value := getattr(self, name)) is not None}
        fixed = {"epochs": epochs, "scheduler": scheduler, "early_stop_epochs": 0}
        return recipe.model_copy(update={**fixed, **own})


def check_tuning(config: FineTuning, view: ConfigView) -> Iterator[str]:
    """Whether the optimizer, the scheduler and the loss of the fine-tuning can be made."""
    tuning = config.changed(TrainConfig(), epochs=1, scheduler=config.scheduler)
    yield from check_loop(tuning, view, place="config", workers=1)
    if config.distillation is not None:
        yield from check_own_loss(view, place="config.distillation", learns="a teacher's outputs are learned")


def mend(
    shop: "Workshop",
    model: "nn.Module",
    config: FineTuning,
    *,
    source: "Source",
    steps: Sequence[Mapping[str, Any]],
    details: Mapping[str, Any],
    after_step: "Callable[[nn.Module], None] | None" = None,
    earlier: Sequence[Mapping[str, float]] = (),
) -> StageResult:
    """Fine-tune a model that `steps` made out of `source`, save it, and compare it with what it was.

    `earlier` are the rows of a training before the steps. What `after_step` keeps, it keeps in the end too.
    """
    from heliostat.stages.models import describe, torch_model

    described, rows, metrics, found = describe(source.folder), list(earlier), {}, dict(details)
    if config.finetune_epochs:
        tuning = config.changed(shop.recipe, epochs=config.finetune_epochs, scheduler=config.scheduler)
        teachers = [shop.teacher or source]
        with taught_by(teachers, config.distillation, task=shop.task, student=model, data=shop.data) as (loss, taught):
            tuned = shop.fine_tune(
                model, tuning, batch_loss=loss, data=taught, after_step=after_step, earlier=len(rows)
            )
        if after_step is not None:
            after_step(model)  # averaged weights are averages of before and after each step
        metrics, found["best_epoch"] = tuned.metrics, len(rows) + tuned.epoch
        rows += tuned.history
    if rows:
        found["history"] = rows
    files = shop.save(model.eval(), history=[*described["history"], *steps], reference=described["reference"])
    found["parity"] = {
        "reload": shop.reload_parity(model),
        "source": shop.parity(torch_model(source), against=source.node),
    }
    return StageResult(files=files, metrics=metrics, details=found)


@contextmanager
def taught_by(
    teachers: "Sequence[Source]", settings: SoftTargets | None, *, task: Task, student: "nn.Module", data: "Data"
) -> "Iterator[Lesson]":
    """The loss of a batch for a student of these teachers, and the data to train it on; without settings, the task's.

    Several teachers' outputs are averaged. They are computed once, before training, where the inputs are whole tensors,
    and at every batch else, or if layers are matched.

    Raises:
        SpecError: a layer that is not there.
        StageError: layers are to be matched with those of several teachers, or of one that is no torch model.
    """
    from heliostat.compression.distill import distillation_loss, matched_features, mean_outputs
    from heliostat.compression.formats import load_model
    from heliostat.stages.models import torch_model
    from heliostat.training.task import build_objective

    if settings is None:
        yield None, data
        return
    loss = build_objective(task).loss

    def soft_loss(outputs: "Tensor", batch: "Batch", soft: "Tensor") -> "Tensor":
        alpha, temperature = settings.alpha, settings.temperature
        return distillation_loss(outputs, soft, batch[1], loss=loss, temperature=temperature, alpha=alpha)

    if not settings.features:
        mean = mean_outputs([load_model(teacher.folder) for teacher in teachers])

        def precomputed(batch: "Batch") -> "Tensor":
            soft: Tensor = batch[2] if len(batch) > 2 else mean(batch[0])
            return soft

        yield (lambda outputs, batch: soft_loss(outputs, batch, precomputed(batch))), _with_outputs(data, mean)
        return

    if len(teachers) > 1:
        raise StageError(f"features: layers are matched with those of one teacher, not of {len(teachers)}")
    model = torch_model(teachers[0])
    with matched_features(student, model, settings.features) as feature_loss:

        def batch_loss(outputs: "Tensor", batch: "Batch") -> "Tensor":
            import torch

            with torch.no_grad():
                soft = model(batch[0])
            return soft_loss(outputs, batch, soft) + settings.feature_weight * feature_loss()

        yield batch_loss, data


def _with_outputs(data: "Data", teacher: Any) -> "Data":
    """The training split with the teacher's outputs as a third tensor, if it is tensors; else as it is."""
    from torch.utils.data import TensorDataset

    from heliostat.compression.distill import teacher_outputs

    train = data["train"]
    if not isinstance(train, TensorDataset):
        return data
    inputs, targets = train.tensors[:2]
    return {**data, "train": TensorDataset(inputs, targets, teacher_outputs(teacher, inputs, TEACHER_BATCH_SIZE))}
