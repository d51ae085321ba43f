"""The pass of `prune`.

Up to two trainings: one that makes the network sparse (a penalty, or a sparsity that rises step by step), whose last
weights count, and after the cut one that mends it, whose best epoch counts.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from heliostat.compression.layers import skipped
from heliostat.compression.prune.heads import remove_heads
from heliostat.compression.prune.masks import Masks, Ramp, below, magnitude, two_of_four
from heliostat.compression.prune.penalty import group_lasso, l1
from heliostat.compression.prune.structured import structured
from heliostat.core.stage import StageResult
from heliostat.errors import StageError
from heliostat.stages.finetuning import mend
from heliostat.stages.models import torch_model
from heliostat.stages.passes.workshop import Source, Workshop
from heliostat.stages.prune import PruneConfig
from heliostat.training.batches import Batch, num_steps
from heliostat.training.config import SchedulerConfig
from heliostat.training.task import build_objective

IMPORTANCE_SAMPLES = 512
"""So many training samples give the gradients that `taylor` weighs channels and heads by."""


def prune_model(shop: Workshop, source: Source, config: PruneConfig) -> StageResult:
    """Prune the model, fine-tune it, and keep what was cut as a history that can be replayed."""
    model = torch_model(source)
    skipped(model, config.skip)  # raises for a pattern that matches nothing, before anything is trained
    rows = _make_sparse(shop, model, config)
    model, steps, masks = _cut(shop, model, config)
    return mend(
        shop,
        model,
        config,
        source=source,
        steps=steps,
        after_step=masks.apply if masks else None,
        earlier=rows,
        details={"pruned": _described(steps, masks)},
    )


def _make_sparse(shop: Workshop, model: nn.Module, config: PruneConfig) -> list[dict[str, float]]:
    """The training before the cut, if there is one, in place; its rows of metrics."""
    if config.penalty is not None:
        strength, loss = config.penalty.strength, build_objective(shop.task).loss
        if config.penalty.name == "l1":
            penalty = l1(model, skip=config.skip)
        else:
            penalty = group_lasso(model, example=shop.example, skip=config.skip)

        def batch_loss(outputs: Tensor, batch: Batch) -> Tensor:
            return loss(outputs, batch[1]) + strength * penalty()

        sparse = config.changed(shop.recipe, epochs=config.penalty.epochs, scheduler=SchedulerConfig())
        return shop.fine_tune(model, sparse, batch_loss=batch_loss, phase="sparse", keep="last").history
    if config.gradual_epochs:
        sparse = config.changed(shop.recipe, epochs=config.gradual_epochs, scheduler=SchedulerConfig())
        steps = sparse.steps_per_epoch or num_steps(shop.data["train"], sparse.batch_size)
        if steps is None:
            raise StageError("gradual_epochs: the training data is a stream; train it with steps_per_epoch")
        ramp = Ramp(config.sparsity, sparse.epochs * steps, scope=config.ranked, skip=config.skip)
        if (latest := shop.checkpoints("sparse").latest()) is not None:
            ramp.resume(model, latest["model"], step=latest["progress"]["epoch"] * steps)
        return shop.fine_tune(model, sparse, after_step=ramp, phase="sparse", keep="last").history
    return []


def _cut(shop: Workshop, model: nn.Module, config: PruneConfig) -> tuple[nn.Module, list[dict[str, Any]], Masks | None]:
    """The model pruned, the steps that rebuild its shapes, and the masks that keep its zeros."""
    threshold = config.penalty.threshold if config.penalty else None
    if config.method == "semi_structured":
        return model, [], two_of_four(model, skip=config.skip)
    if config.method == "magnitude":
        if threshold is not None:
            return model, [], below(model, threshold=threshold, skip=config.skip)
        return model, [], magnitude(model, sparsity=config.sparsity, scope=config.ranked, skip=config.skip)
    backward: Callable[[nn.Module], None] | None = None
    if config.importance == "taylor":
        backward = shop.backward_on(IMPORTANCE_SAMPLES)
    steps: list[dict[str, Any]] = []
    if config.sparsity or threshold is not None:
        model, steps = structured(
            model,
            example=shop.example,
            sparsity=None if threshold else config.sparsity,
            threshold=threshold,
            importance=config.importance,
            backward=backward,
            scope=config.ranked,
            skip=config.skip,
        )
    if config.head_sparsity:
        model, fewer = remove_heads(model, sparsity=config.head_sparsity, skip=config.skip, backward=backward)
        steps += fewer
    return model, steps, None


def _described(steps: list[dict[str, Any]], masks: Masks | None) -> dict[str, Any]:
    """For the record: what went of which layer, and why other layers were left alone."""
    if masks is not None:
        return {"sparsity": masks.sparsity, "layers": masks.sparsities, "kept": dict(masks.kept)}
    described: dict[str, Any] = {}
    for step in steps:
        if step["op"] == "structured":
            described["channels_removed"] = {name: len(channels) for name, _, channels in step["groups"]}
            described["kept"] = step["kept"]
        else:
            described["heads_left"] = {name: len(heads) for name, heads in step["layers"].items()}
    return described
