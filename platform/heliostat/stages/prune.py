"""`prune`: cut a trained network down, then train what is left for a few epochs."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from heliostat.core.model import Count, Fraction, NonNegative, NonNegativeInt, Number, Positive, Spec
from heliostat.core.stage import ConfigView, StageContext, StageResult, stage
from heliostat.stages.checks import check_metric, check_own_loss, check_trainable
from heliostat.stages.finetuning import FineTuning, check_tuning, params_used

OPTIONS: dict[str, frozenset[str]] = {
    "structured": frozenset(
        {"sparsity", "sensitivity", "scope", "importance", "head_sparsity", "gradual_epochs", "penalty"}
    ),
    "magnitude": frozenset({"sparsity", "sensitivity", "scope", "gradual_epochs", "penalty"}),
    "semi_structured": frozenset(),
}
"""What each method takes beside `skip` and the options of fine-tuning."""
DECIDED_BY_PENALTY = frozenset({"sparsity", "sensitivity", "scope", "importance", "gradual_epochs"})
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


class SensitivityConfig(Spec):
    """Each layer alone is pruned to some `levels` and measured on `val`, then all of them so far that they cost alike.

    With `structured` an attention layer takes part with its heads. That makes `sparsity` of the whole network, or as
    much as `max_drop` allows.
    """

    levels: tuple[Annotated[Number, Field(gt=0, lt=1)], ...] = Field((0.25, 0.5, 0.75, 0.9), min_length=1)
    """The sparsities that are tried, rising."""
    max_drop: dict[str, NonNegative] = Field(default_factory=dict)
    """By how much the metrics of `val` may drop when all is cut, before any fine-tuning."""

    @field_validator("levels")
    @classmethod
    def _rising(cls, levels: tuple[float, ...]) -> tuple[float, ...]:
        if list(levels) != sorted(set(levels)):
            raise ValueError(f"{list(levels)} do not rise; write {sorted(set(levels))}")
        return levels


class PruneConfig(FineTuning):
    """`structured` removes `sparsity` of every layer's channels, so that the network gets smaller and faster.

    `magnitude` sets `sparsity` of all weights to zero, and `semi_structured` two of every four: the file compresses
    better, but no kernel of a CPU skips the zeros.
    """

    method: Literal["structured", "magnitude", "semi_structured"] = "structured"
    sparsity: Fraction = 0.5
    sensitivity: SensitivityConfig | None = None
    """How far each layer goes follows from a scan of what that costs, instead of from `scope`."""
    scope: Literal["global", "layer"] | None = None
    """Rank all layers together, or take the fraction from each: by default `layer`, for `magnitude` `global`."""
    importance: Literal["magnitude", "taylor", "bn_scale"] = "magnitude"
    """Which channels matter: by the norm of their weights, by what the loss says, by the scale of their batch norm."""
    head_sparsity: Fraction = 0.0
    """The fraction of the heads of every attention layer that goes. A scan sets it for each."""
    penalty: PenaltyConfig | None = None
    """Its threshold decides what goes, instead of `sparsity`."""
    gradual_epochs: NonNegativeInt = 0
    """Epochs in which the sparsity rises from 0 by the cubic law; 0 is one shot. Channels and heads go before each of
    them."""
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
        if self.sensitivity is not None:
            self._check_sensitivity(self.sensitivity)
        return self

    def _check_sensitivity(self, scan: SensitivityConfig) -> None:
        if "scope" in self.model_fields_set:
            raise ValueError("sensitivity says how far each layer goes; leave 'scope' out")
        if "head_sparsity" in self.model_fields_set:
            raise ValueError("sensitivity says how many heads of each attention go; leave 'head_sparsity' out")
        if scan.max_drop and "sparsity" in self.model_fields_set:
            raise ValueError("sensitivity.max_drop decides how much goes; leave 'sparsity' out")
        if not scan.max_drop and self.sparsity > scan.levels[-1]:
            raise ValueError(f"sparsity {self.sparsity} is beyond the last of sensitivity.levels, {scan.levels[-1]}")

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
    if config.penalty is not None:
        yield from check_own_loss(view, place="config.penalty", learns="sparsity is learned")
    for metric in config.sensitivity.max_drop if config.sensitivity else ():
        yield from check_metric(metric, view, place=f"config.sensitivity.max_drop.{metric}", splits=("val",))


@stage(
    "prune",
    inputs={"model": "model"},
    output="model",
    version=5,
    measured="later",
    workload=lambda config: {"epochs": config.epochs},
    check=_check,
    params_used=params_used,
)
def prune(context: StageContext, config: PruneConfig) -> StageResult:
    """Prune the model in the slot `model`, fine-tune it, and keep what was cut as a history that can be replayed."""
    from heliostat.stages.models import train_config_of, workshop_of
    from heliostat.stages.passes.prune import prune_model

    source = context.one("model")
    pruned = prune_model(workshop_of(context, train_config_of(source)), source, config)
    return replace(pruned, params=source.record.params)
