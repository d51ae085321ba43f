"""What a training run is told: the one config that `tune`, `train`, fine-tuning and `distill` share.

No torch here: `plan` reads this module.
"""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from heliostat.core.imports import REFERENCE
from heliostat.core.model import Count, Flag, Fraction, NonNegative, NonNegativeInt, Number, Positive, Spec
from heliostat.core.spec import Task
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


SHAPES = ("constant", "cosine", "linear")
"""The learning rates that are built in: after the warm-up, by optimizer step."""
SCHEDULERS = (
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "CyclicLR",
    "ExponentialLR",
    "LinearLR",
    "MultiStepLR",
    "OneCycleLR",
    "PolynomialLR",
    "ReduceLROnPlateau",
    "StepLR",
)
"""The classes of `torch.optim.lr_scheduler` that plain values describe."""


class OptimizerConfig(Spec):
    """An optimizer of `torch.optim` by name, or any other class as `module:Class`, to which `options` go as they are.

    An option that is left out has the optimizer's own default, `lr` apart.
    """

    name: str = "adam"
    lr: Positive = 1e-3
    weight_decay: NonNegative | None = None
    momentum: NonNegative | None = None
    nesterov: Flag | None = None
    betas: tuple[Number, Number] | None = None
    eps: Positive | None = None
    options: dict[str, Any] = Field(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in OPTIMIZERS and not REFERENCE.fullmatch(name):
            raise ValueError(f"unknown optimizer {name!r}{nearest(name, OPTIMIZERS)}")
        return name

    @model_validator(mode="after")
    def _options_fit(self) -> "OptimizerConfig":
        if self.is_reference:
            return self
        for option in self.arguments:
            if option not in OPTIMIZERS[self.name]:
                raise ValueError(
                    f"{self.name} takes no {option!r}; it takes {', '.join(sorted(OPTIMIZERS[self.name]))}"
                )
        return self

    @property
    def is_reference(self) -> bool:
        """Whether the name is an import path."""
        return self.name not in OPTIMIZERS

    @property
    def code_references(self) -> tuple[str, ...]:
        return (self.name,) if self.is_reference else ()

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments for the optimizer's constructor."""
        named = {k: v for k, v in self.model_dump(exclude={"name", "options"}).items() if v is not None}
        return named | self.options


class SchedulerConfig(Spec):
    """The learning rate: a linear warm-up by step, then `constant`, or `cosine` or `linear` down to zero.

    Or a class of `torch.optim.lr_scheduler` by name, made with `options` and stepped once an epoch or a step, as `per`
    says. `ReduceLROnPlateau` looks at the monitored figure, once an epoch.
    """

    name: str = "constant"
    warmup_epochs: NonNegative = 0.0
    options: dict[str, Any] = Field(default_factory=dict)
    per: Literal["epoch", "step"] = "epoch"

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in SHAPES + SCHEDULERS:
            raise ValueError(f"unknown scheduler {name!r}{nearest(name, SHAPES + SCHEDULERS)}")
        return name

    @model_validator(mode="after")
    def _options_fit(self) -> "SchedulerConfig":
        if self.name in SHAPES and (self.options or self.per != "epoch"):
            raise ValueError(f"{self.name} takes only warmup_epochs; options and per are for {', '.join(SCHEDULERS)}")
        if self.name in SCHEDULERS and self.warmup_epochs:
            raise ValueError(f"warmup_epochs goes with {', '.join(SHAPES)}, not with {self.name}")
        if self.name == "ReduceLROnPlateau" and self.per == "step":
            raise ValueError("ReduceLROnPlateau looks at a figure of the whole epoch; leave out per")
        return self


class TrainConfig(Spec):
    """One training run. `batch_size` is global: the workers share it, so their number changes nothing but speed."""

    epochs: Count = 10
    batch_size: Count = 64
    model_args: dict[str, Any] = Field(default_factory=dict)
    data_args: dict[str, Any] = Field(default_factory=dict)
    optimizer: OptimizerConfig = OptimizerConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    strategy: Literal["auto", "single", "ddp"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What a forward pass computes in; weights stay fp32. With fp16 the loss is scaled, so that gradients survive."""
    clip_grad_norm: Positive | None = None
    accumulate_steps: Count = 1
    """In how many parts each worker computes its share of a batch, to save memory; the batch stays `batch_size`."""
    early_stop_epochs: NonNegativeInt = 0
    """Stop after this many epochs without a better `val` figure; 0 is never."""
    monitor: str | None = None
    """The figure that decides which epoch is best, such as `val_accuracy`.

    By default the first of `task.metrics` on `val`, else `val_loss`.
    """
    ema_decay: Fraction | None = None
    """Evaluate and keep an exponential moving average of the weights (Polyak and Juditsky 1992), by optimizer step."""
    steps_per_epoch: Count | None = None
    """An epoch ends after so many global batches; by default when the data ends."""
    validate_every_steps: Count | None = None
    """Look at `val` also after every so many optimizer steps; only reported, nothing is chosen by it."""
    deterministic: Flag = False
    """Refuse operations whose result depends on the order of threads."""
    compile: Flag = False
    """Compile the model with `torch.compile` before the first step."""

    @property
    def code_references(self) -> tuple[str, ...]:
        return self.optimizer.code_references


def why_not_trained(config: TrainConfig, *, workers: int, task: Task) -> Iterator[str]:
    """What of the config so many workers cannot do, each as `place in the config: why`."""
    if config.strategy == "single" and workers > 1:
        yield f"strategy: 'single' trains with one worker, not {workers}; take 'ddp' or 'auto'"
