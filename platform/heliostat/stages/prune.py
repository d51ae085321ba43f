"""`prune`: cut a trained network down, then train what is left for a few epochs.

Up to two trainings: one that makes the network sparse (a penalty, or a sparsity that rises step by step), whose last
weights count, and after the cut one that mends it, whose best epoch counts.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from heliostat.core.model import Count, Fraction, NonNegativeInt, Positive, Spec
from heliostat.core.stage import ConfigView, StageContext, StageResult, stage
from heliostat.errors import StageError
from heliostat.stages.checks import check_trainable
from heliostat.stages.finetuning import FineTuning, check_tuning
from heliostat.training.config import SchedulerConfig, TrainConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from heliostat.compression.prune.masks import Masks
    from heliostat.training.batches import Batch

IMPORTANCE_SAMPLES = 512
"""So many training samples give the gradients that `taylor` weighs channels and heads by."""

OPTIONS: dict[str, frozenset[str]] = {
    "structured": frozenset({"sparsity", "scope", "importance", "head_sparsity", "penalty"}),
    "magnitude": frozenset({"sparsity", "scope", "gradual_epochs", "penalty"}),
    "semi_structured": frozenset(),
}
"""What each method takes beside `skip` and the options of fine-tuning."""
DECIDED_BY_PENALTY = frozenset({"sparsity", "scope", "importance", "gradual_epochs"})
PENALTY_OF = {"structured": "group_lasso", "magnitude": "l1"}


class PenaltyConfig(Spec):
    """Sparsity learned in training: `strength` times the penalty is added to the loss, then what is small is cut.

    `l1` is the sum of all |w|, for single weights; `group_lasso` that of the norms of channels, for whole ones.
    """

    name: Literal["l1", "group_lasso"]
    strength: Positive = 1e-4
    epochs: Count = 3
    threshold: Positive = 1e-2
    """Of |w|; for channels, of the root mean square of their weights."""


class PruneConfig(FineTuning):
    """`structured` removes `sparsity` of every layer's channels, so that the network gets smaller and faster.

    `magnitude` sets `sparsity` of all weights to zero, and `semi_structured` two of every four: the file compresses
    better, but no kernel of a CPU skips the zeros.
    """

    method: Literal["structured", "magnitude", "semi_structured"] = "structured"
    sparsity: Fraction = 0.5
    scope: Literal["global", "layer"] | None = None
    """Rank all layers together, or take the fraction from each: by default `layer`, for `magnitude` `global`."""
    importance: Literal["magnitude", "taylor", "bn_scale"] = "magnitude"
    """Which channels matter: by the norm of their weights, by what the loss says, by the scale of their batch norm."""
    head_sparsity: Fraction = 0.0
    """The fraction of the heads of every attention layer that goes."""
    penalty: PenaltyConfig | None = None
    """Its threshold decides what goes, instead of `sparsity`."""
    gradual_epochs: NonNegativeInt = 0
    """Epochs in which the sparsity rises from 0 by the cubic law; 0 is one shot."""
    skip: tuple[str, ...] = ()
    """Patterns of layer names to leave alone, such as `stem.*`."""

    @model_validator(mode="after")
    def _options_fit(self) -> "PruneConfig":
        for option in sorted(self.model_fields_set & frozenset().union(*OPTIONS.values())):
            if option not in OPTIONS[self.method]:
                takes = ", ".join(sorted(OPTIONS[self.method])) or "skip"
                raise ValueError(f"{self.method} takes no {option!r}; it takes {takes}")
            if self.penalty is not None and option in DECIDED_BY_PENALTY:
                raise ValueError(f"the penalty's threshold decides what goes; leave {option!r} out")
        if self.penalty is not None and self.penalty.name != PENALTY_OF[self.method]:
            goes_with = PENALTY_OF[self.method]
            raise ValueError(f"{self.method} goes with the penalty {goes_with!r}, not {self.penalty.name!r}")
        return self

    @property
    def ranked(self) -> Literal["global", "layer"]:
        """The scope, with its default."""
        return self.scope or ("global" if self.method == "magnitude" else "layer")

    @property
    def epochs(self) -> int:
        """Of both trainings together."""
        return self.gradual_epochs + (self.penalty.epochs if self.penalty else 0) + self.finetune_epochs


def _check(config: PruneConfig, view: ConfigView) -> Iterator[str]:
    yield from check_trainable(view, slot="model")
    yield from check_tuning(config, view)


@stage(
    "prune",
    inputs={"model": "model"},
    output="model",
    version=2,
    measured="later",
    workload=lambda config: {"epochs": config.epochs},
    check=_check,
)
def prune(context: StageContext, config: PruneConfig) -> StageResult:
    """Prune the model in the slot `model`, fine-tune it, and keep what was cut as a history that can be replayed."""
    from heliostat.compression.layers import skipped
    from heliostat.stages.finetuning import mend
    from heliostat.stages.models import torch_model, train_config_of

    source = context.one("model")
    recipe, model = train_config_of(source), torch_model(source)
    skipped(model, config.skip)  # raises for a pattern that matches nothing, before anything is trained
    rows = _make_sparse(context, model, config, recipe)
    model, steps, masks = _cut(context, model, config, recipe)
    return mend(
        context,
        model,
        config,
        source=source,
        steps=steps,
        after_step=masks.apply if masks else None,
        earlier=rows,
        details={"pruned": _described(steps, masks)},
    )


def _make_sparse(
    context: StageContext, model: "nn.Module", config: PruneConfig, recipe: TrainConfig
) -> list[dict[str, float]]:
    """The training before the cut, if there is one, in place; its rows of metrics."""
    from heliostat.compression.prune.masks import Ramp
    from heliostat.compression.prune.penalty import group_lasso, l1
    from heliostat.stages.models import checkpoints_of, example_of, fine_tune
    from heliostat.training.batches import num_steps
    from heliostat.training.task import build_data, build_objective

    if config.penalty is not None:
        strength, loss = config.penalty.strength, build_objective(context.task).loss
        if config.penalty.name == "l1":
            penalty = l1(model, skip=config.skip)
        else:
            penalty = group_lasso(model, example=example_of(context.task, recipe), skip=config.skip)

        def batch_loss(outputs: "Tensor", batch: "Batch") -> "Tensor":
            return loss(outputs, batch[1]) + strength * penalty()

        sparse = config.changed(recipe, epochs=config.penalty.epochs, scheduler=SchedulerConfig())
        return fine_tune(context, model, sparse, batch_loss=batch_loss, phase="sparse", keep="last").history
    if config.gradual_epochs:
        sparse = config.changed(recipe, epochs=config.gradual_epochs, scheduler=SchedulerConfig())
        train = build_data(context.task, recipe.data_args)["train"]
        steps = sparse.steps_per_epoch or num_steps(train, sparse.batch_size)
        if steps is None:
            raise StageError("gradual_epochs: the training data is a stream; train it with steps_per_epoch")
        ramp = Ramp(config.sparsity, sparse.epochs * steps, scope=config.ranked, skip=config.skip)
        if (latest := checkpoints_of(context, "sparse").latest()) is not None:
            ramp.resume(model, latest["model"], step=latest["progress"]["epoch"] * steps)
        return fine_tune(context, model, sparse, after_step=ramp, phase="sparse", keep="last").history
    return []


def _cut(
    context: StageContext, model: "nn.Module", config: PruneConfig, recipe: TrainConfig
) -> "tuple[nn.Module, list[dict[str, Any]], Masks | None]":
    """The model pruned, the steps that rebuild its shapes, and the masks that keep its zeros."""
    from heliostat.compression.prune.heads import remove_heads
    from heliostat.compression.prune.masks import below, magnitude, two_of_four
    from heliostat.compression.prune.structured import structured
    from heliostat.stages.models import backward_on, example_of

    threshold = config.penalty.threshold if config.penalty else None
    if config.method == "semi_structured":
        return model, [], two_of_four(model, skip=config.skip)
    if config.method == "magnitude":
        if threshold is not None:
            return model, [], below(model, threshold=threshold, skip=config.skip)
        return model, [], magnitude(model, sparsity=config.sparsity, scope=config.ranked, skip=config.skip)
    backward: Callable[[nn.Module], None] | None = None
    if config.importance == "taylor":
        backward = backward_on(context.task, recipe, count=IMPORTANCE_SAMPLES)
    steps: list[dict[str, Any]] = []
    if config.sparsity or threshold is not None:
        model, steps = structured(
            model,
            example=example_of(context.task, recipe),
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


def _described(steps: list[dict[str, Any]], masks: "Masks | None") -> dict[str, Any]:
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
