"""`prune`: cut a trained network down, then train what is left for a few epochs."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from heliostat.core.model import Count, Fraction, NonNegativeInt, Spec
from heliostat.core.stage import ConfigView, StageContext, StageResult, stage
from heliostat.stages.checks import check_trainable
from heliostat.training.config import OptimizerConfig, SchedulerConfig, TrainConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn


class PruneConfig(Spec):
    """`structured` removes `sparsity` of every layer's channels, so that the network gets smaller and faster.

    `magnitude` sets `sparsity` of all weights to zero: the file compresses better, but no kernel skips the zeros.
    Fine-tuning goes by the recipe that the model was trained with; `batch_size`, `optimizer` and `scheduler` change it.
    """

    method: Literal["structured", "magnitude"] = "structured"
    sparsity: Fraction = 0.5
    skip: tuple[str, ...] = ()
    """Patterns of layer names to leave alone, such as `stem.*`."""
    finetune_epochs: NonNegativeInt = 0
    batch_size: Count | None = None
    optimizer: OptimizerConfig | None = None
    scheduler: SchedulerConfig = SchedulerConfig(name="cosine")

    @property
    def code_references(self) -> tuple[str, ...]:
        return self.optimizer.code_references if self.optimizer else ()


def _check(config: PruneConfig, view: ConfigView) -> Iterator[str]:
    yield from check_trainable(view, slot="model")


@stage(
    "prune",
    inputs={"model": "model"},
    output="model",
    measured="later",
    workload=lambda config: {"epochs": config.finetune_epochs},
    check=_check,
)
def prune(context: StageContext, config: PruneConfig) -> StageResult:
    """Prune the model in the slot `model`, fine-tune it, and keep what was cut as a history that can be replayed."""
    from heliostat.compression import prune as pruning
    from heliostat.stages.models import (
        describe,
        example_of,
        fine_tune,
        parity,
        save_trained,
        torch_model,
        train_config_of,
    )

    source = context.one("model")
    recipe = train_config_of(source)
    model, history = torch_model(source), list(describe(source.folder)["history"])
    after_step: Callable[[nn.Module], None] | None = None
    if config.method == "structured":
        example = example_of(context.task, recipe)
        model, steps = pruning.structured(model, example=example, sparsity=config.sparsity, skip=config.skip)
        history += steps
    else:
        masks = pruning.magnitude(model, sparsity=config.sparsity, skip=config.skip)
        after_step = masks.apply

    metrics: dict[str, float] = {}
    details: dict[str, object] = {}
    if config.finetune_epochs:
        tuned = fine_tune(context, model, _finetuning(recipe, config), after_step=after_step)
        metrics = dict(tuned.metrics)
        details = {"best_epoch": tuned.epoch, "history": tuned.history}
    files = save_trained(context, model.eval(), config=recipe, history=history)
    details["parity"] = {
        "reload": parity(context, recipe, model, against="the model before saving"),
        "source": parity(context, recipe, torch_model(source), against=source.node),
    }
    return StageResult(files=files, metrics=metrics, params=source.record.params, details=details)


def _finetuning(recipe: TrainConfig, config: PruneConfig) -> TrainConfig:
    changes = {name: getattr(config, name) for name in ("batch_size", "optimizer") if getattr(config, name) is not None}
    fixed = {"epochs": config.finetune_epochs, "scheduler": config.scheduler, "early_stop_epochs": 0}
    return recipe.model_copy(update={**fixed, **changes})
