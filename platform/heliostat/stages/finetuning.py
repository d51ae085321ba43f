"""How stages that change a trained model train it on."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from heliostat.core.artifact import Record
from heliostat.core.model import Count, NonNegative, NonNegativeInt, Number, Positive, Spec
from heliostat.core.stage import ConfigView, StageResult, Validated
from heliostat.stages.checks import check_loop, check_own_loss
from heliostat.stages.measure import recipe_of
from heliostat.training.config import OptimizerConfig, SchedulerConfig, StrategyConfig, TrainConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from heliostat.stages.passes.workshop import Source, Workshop


SoftLoss = Literal["auto", "regression", "binary", "classes", "tokens", "dense"]
"""How a student's outputs are compared with a teacher's (`compression/soft_loss.py`); `auto` asks the task's loss."""


class SoftTargets(Spec):
    """Learning from a teacher's outputs, and from what its layers make of the data, beside the true targets."""

    temperature: Positive = 4.0
    """Divides the logits of both before they are compared: the higher, the more the small ones count."""
    alpha: Annotated[Number, Field(ge=0, le=1)] = 0.7
    """The weight of the teacher's outputs; the rest is the weight of the true targets."""
    loss: SoftLoss = "auto"
    """`regression` squares the difference of outputs; `binary` takes each as a logit of yes or no; `classes`, `tokens`
    and `dense` compare softmaxes: of (batch, classes), over the last dim of each token, over dim 1 of each pixel.

    It is not marked as added: records from before it may come of a loss that did not suit the task.
    """
    features: dict[str, str] = Field(default_factory=dict)
    """Layers of the student, each with the layer of the teacher whose features it should tell apart alike."""
    feature_weight: NonNegative = 1.0
    """The weight of each such pair beside the two above."""


TUNED = ("batch_size", "optimizer", "scheduler")
"""What a fine-tuning may say otherwise than the recipe."""


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


def params_of_tuning(config: FineTuning, source: Record, *, trains: bool) -> Mapping[str, Any]:
    """The parameters that a stage works with: its own, and what it takes over from the recipe of its model."""
    own = config.model_dump(mode="json", exclude=None if trains else set(FineTuning.model_fields))
    if not trains:
        return own
    tuning = config.changed(recipe_of(source.params), epochs=config.finetune_epochs, scheduler=config.scheduler)
    one_worker = tuning.model_copy(update={"strategy": StrategyConfig(name="single")})
    return {**one_worker.model_dump(mode="json", exclude={"epochs"}), **{k: own[k] for k in own if k not in TUNED}}


def params_used(config: FineTuning, inputs: Mapping[str, Sequence[Record]]) -> Mapping[str, Any]:
    """Those of a stage with one model in the slot `model`, which it trains if its config has epochs."""
    epochs = getattr(config, "epochs", config.finetune_epochs)
    return params_of_tuning(config, inputs["model"][0], trains=epochs > 0)


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
    from heliostat.stages.passes.teaching import taught_by

    described, rows, metrics, found = describe(source.folder), list(earlier), {}, dict(details)
    validated = None
    if config.finetune_epochs:
        tuning = config.changed(shop.recipe, epochs=config.finetune_epochs, scheduler=config.scheduler)
        teachers = [shop.teacher or source]
        with taught_by(shop, teachers, config.distillation, student=model, option="distillation.loss") as lesson:
            tuned = shop.fine_tune(
                model, tuning, batch_loss=lesson.loss, data=lesson.data, after_step=after_step, earlier=len(rows)
            )
        found |= lesson.details
        if after_step is not None:
            after_step(model)  # averaged weights are averages of before and after each step
        metrics, found["best_epoch"] = tuned.metrics, len(rows) + tuned.epoch
        validated = Validated(tuned.metrics, tuned.layers)
        rows += tuned.history
        found |= tuned.notes
    if rows:
        found["history"] = rows
    files = shop.save(model.eval(), history=[*described["history"], *steps], reference=described["reference"])
    found["parity"] = {
        "reload": shop.reload_parity(model),
        "source": shop.parity(torch_model(source), against=source.node),
    }
    return StageResult(files=files, metrics=metrics, details=found, validated=validated)
