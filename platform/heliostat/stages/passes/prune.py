"""The pass of `prune`.

Up to two trainings: one that makes the network sparse (a penalty, or a sparsity that rises step by step), whose last
weights count, and after the cut one that mends it, whose best epoch counts.
"""

from dataclasses import replace

from torch import Tensor, nn

from heliostat.compression.layers import skipped
from heliostat.compression.parametrizations import bake
from heliostat.compression.prune.heads import attention_layers
from heliostat.compression.prune.masks import Ramp, Sparsity, risen
from heliostat.compression.prune.penalty import group_lasso, l1
from heliostat.compression.prune.structured import widths
from heliostat.core.stage import StageResult
from heliostat.errors import StageError
from heliostat.stages.finetuning import mend
from heliostat.stages.models import torch_model
from heliostat.stages.passes.cut import Steps, channels_and_heads, cut, cut_channels, cut_heads, described
from heliostat.stages.passes.scan import scan
from heliostat.stages.passes.workshop import Source, Workshop
from heliostat.stages.prune import PenaltyConfig, PruneConfig
from heliostat.training.batches import Batch, num_steps
from heliostat.training.config import SchedulerConfig
from heliostat.training.leftover import find_min_rows
from heliostat.training.losses import Loss, LossRule, plus
from heliostat.training.seeding import derive_seed
from heliostat.training.world import World

Rows = list[dict[str, float]]


def prune_model(shop: Workshop, source: Source, config: PruneConfig) -> StageResult:
    """Prune the model, fine-tune it, and keep what was cut as a history that can be replayed."""
    model = torch_model(source)
    baked = bake(model, shop.proof)
    skipped(model, config.skip)  # raises for a pattern that matches nothing, before anything is trained
    sparsity: Sparsity = config.sparsity
    details = {}
    if config.sensitivity is not None:
        sparsity, table = scan(shop, source, model, config, config.sensitivity)
        details = {"sensitivity": table, "sparsities": sparsity}
    masks = None
    if config.gradual_epochs and config.method == "structured":
        model, steps, rows = _cut_step_by_step(shop, model, config, sparsity)
    else:
        rows = _make_sparse(shop, model, config, sparsity)
        model, steps, masks = cut(shop, model, config, sparsity)
    return mend(
        shop,
        model,
        config,
        source=source,
        steps=[*baked, *steps],
        after_step=masks.apply if masks else None,
        earlier=rows,
        details={"pruned": described([*baked, *steps], masks), **details},
    )


def _make_sparse(shop: Workshop, model: nn.Module, config: PruneConfig, sparsity: Sparsity) -> Rows:
    """The training before the cut, if there is one, in place; its rows of metrics."""
    if config.penalty is not None:
        return _penalized(shop, model, config, config.penalty)
    if config.gradual_epochs:
        sparse = config.changed(shop.recipe, epochs=config.gradual_epochs, scheduler=SchedulerConfig())
        loss, world = shop.objective.loss, World()
        rule = LossRule(lambda outputs, batch: loss(outputs, batch[1]), precision=sparse.precision, device=world.device)
        least = find_min_rows(model, shop.data["train"], sparse, rule=rule, world=world)
        steps = sparse.steps_per_epoch or num_steps(shop.data["train"], sparse.batch_size, min_rows=least.rows)
        if steps is None:
            raise StageError("gradual_epochs: the training data is a stream; train it with steps_per_epoch")
        ramp = Ramp(sparsity, sparse.epochs * steps, scope=config.ranked, skip=config.skip)
        if (latest := shop.checkpoints("sparse").latest()) is not None:
            ramp.resume(model, latest["model"], step=latest["progress"]["epoch"] * steps)
        return shop.fine_tune(model, sparse, after_step=ramp, phase="sparse", keep="last").history
    return []


def _penalized(shop: Workshop, model: nn.Module, config: PruneConfig, penalized: PenaltyConfig) -> Rows:
    objective = shop.objective
    if penalized.name == "l1":
        penalty = l1(model, skip=config.skip)
    else:
        penalty = group_lasso(model, example=shop.proof, skip=config.skip)

    def batch_loss(outputs: Tensor, batch: Batch) -> Loss:
        return plus(objective.part_of_loss(outputs, batch[1]), penalized.strength * penalty())

    sparse = config.changed(shop.recipe, epochs=penalized.epochs, scheduler=SchedulerConfig())
    return shop.fine_tune(model, sparse, batch_loss=batch_loss, phase="sparse", keep="last").history


def _cut_step_by_step(
    shop: Workshop, model: nn.Module, config: PruneConfig, sparsity: Sparsity
) -> tuple[nn.Module, Steps, Rows]:
    """Some channels and heads go, then the smaller network is trained for an epoch, and so on: what is left learns to
    do without.

    Each epoch is a training of its own, since the optimizer's state has the shapes of the network.
    """
    _, first, _ = cut(shop, model, config, sparsity)  # raises for what cannot go, before anything is trained
    kept: dict[str, str] = next((step["kept"] for step in first if step["op"] == "structured"), {})
    channels, heads = channels_and_heads(model, config, sparsity)
    num_channels = widths(model, example=shop.proof, importance=config.importance, skip=config.skip)
    num_heads = {name: layer.num_heads for name, layer in attention_layers(model, config.skip).items()}
    one_epoch = config.changed(shop.recipe, epochs=1, scheduler=SchedulerConfig())
    steps: Steps = []
    rows: Rows = []
    for epoch in range(1, config.gradual_epochs + 1):
        part = epoch / config.gradual_epochs
        model, narrower = cut_channels(shop, model, config, risen(channels, part), of=num_channels, kept=kept)
        model, fewer = cut_heads(shop, model, config, risen(heads, part), of=num_heads)
        steps += [*(step for step in narrower if step["groups"]), *fewer]
        seeded = replace(shop, seed=derive_seed(shop.seed, epoch))
        rows += seeded.fine_tune(model, one_epoch, phase=f"sparse-{epoch}", keep="last", earlier=len(rows)).history
    return model, steps, rows
