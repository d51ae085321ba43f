"""What a training run is told: the one config that `tune`, `train`, fine-tuning and `distill` share.

No torch here: `plan` reads this module.
"""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from heliostat.core.model import Count, Flag, NonNegative, NonNegativeInt, Number, Positive, Spec
from heliostat.errors import nearest

OPTIMIZERS: dict[str, frozenset[str]] = {
    "sgd": frozenset({"lr", "weight_decay", "momentum", "nesterov"}),
    "adam": frozenset({"lr", "weight_decay", "betas", "eps"}),
    "adamw": frozenset({"lr", "weight_decay", "betas", "eps"}),
    "nadam": frozenset({"lr", "weight_decay", "betas", "eps"}),
    "radam": frozenset({"lr", "weight_decay", "betas", "eps"}),
    "rmsprop": frozenset({"lr", "weight_decay", "momentum", "eps"}),
    "adagrad": frozenset({"lr", "weight_decay", "eps"}),
}
"""The optimizers of `torch.optim` known by name, and the options that each takes."""


class OptimizerConfig(Spec):
    """An optimizer of `torch.optim`. An option that is left out has torch's own default, `lr` apart."""

    name: str = "adam"
    lr: Positive = 1e-3
    weight_decay: NonNegative | None = None
    momentum: NonNegative | None = None
    nesterov: Flag | None = None
    betas: tuple[Number, Number] | None = None
    eps: Positive | None = None

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {name!r}{nearest(name, OPTIMIZERS)}")
        return name

    @model_validator(mode="after")
    def _options_fit(self) -> "OptimizerConfig":
        for option in self.options:
            if option not in OPTIMIZERS[self.name]:
                raise ValueError(
                    f"{self.name} takes no {option!r}; it takes {', '.join(sorted(OPTIMIZERS[self.name]))}"
                )
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments for the optimizer's constructor."""
        return {k: v for k, v in self.model_dump(exclude={"name"}).items() if v is not None}


class SchedulerConfig(Spec):
    """The learning rate by optimizer step: a linear warm-up, then `constant`, or `cosine` or `linear` down to zero."""

    name: Literal["constant", "cosine", "linear"] = "constant"
    warmup_epochs: NonNegative = 0.0


class TrainConfig(Spec):
    """One training run. `batch_size` is global: the workers share it, so their number changes nothing but speed."""

    epochs: Count = 10
    batch_size: Count = 64
    model_args: dict[str, Any] = Field(default_factory=dict)
    data_args: dict[str, Any] = Field(default_factory=dict)
    optimizer: OptimizerConfig = OptimizerConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    strategy: Literal["auto", "single", "ddp"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    clip_grad_norm: Positive | None = None
    accumulate_steps: Count = 1
    """In how many parts each worker computes its share of a batch, to save memory; the batch stays `batch_size`."""
    early_stop_epochs: NonNegativeInt = 0
    """Stop after this many epochs without a better `val` figure; 0 is never."""
    monitor: str | None = None
    """The figure that decides which epoch is best, such as `val_accuracy`.

    By default the first of `task.metrics` on `val`, else `val_loss`.
    """
