"""The learning-rate schedule of a train config. No torch here: `plan` reads this module."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from heliostat.core.model import NonNegative, Spec
from heliostat.errors import nearest

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
LENGTHS = {
    "CosineAnnealingLR": "T_max",
    "LinearLR": "total_iters",
    "OneCycleLR": "total_steps",
    "PolynomialLR": "total_iters",
}
"""The option of these that says how often they are stepped: in the whole training, where it is left out."""
OVER_ALL = ("LinearLR", "PolynomialLR")
"""Those whose `total_iters` would be 5 in torch, whatever the length of the training."""


class SchedulerConfig(Spec):
    """The learning rate: a linear warm-up by step, then `constant`, or `cosine` or `linear` down to zero.

    Or a class of `torch.optim.lr_scheduler` by name, made with `options` and stepped once an epoch or a step, as `per`
    says. `ReduceLROnPlateau` looks at the monitored figure, once an epoch. An option that is the length of the training
    may be left out: `total_steps` and `T_max`, and `total_iters` of `LinearLR` and `PolynomialLR`; so may `max_lr` of
    `OneCycleLR`, which is then the optimizer's `lr`.
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

    @model_validator(mode="before")
    @classmethod
    def _over_the_whole_training(cls, value: Any) -> Any:
        """Write down what differs from torch's own default. It is left behind where a search takes another name."""
        options = value.get("options", {}) if isinstance(value, Mapping) else None
        if not isinstance(options, Mapping):
            return value
        if value.get("name") in OVER_ALL:
            return {**value, "options": {"total_iters": None, **options}}
        if options.get("total_iters", 0) is None:
            return {**value, "options": {name: option for name, option in options.items() if name != "total_iters"}}
        return value

    @model_validator(mode="after")
    def _options_fit(self) -> "SchedulerConfig":
        if self.name in SHAPES and (self.options or self.per != "epoch"):
            raise ValueError(f"{self.name} takes only warmup_epochs; options and per are for {', '.join(SCHEDULERS)}")
        if self.name in SCHEDULERS and self.warmup_epochs:
            raise ValueError(f"warmup_epochs goes with {', '.join(SHAPES)}, not with {self.name}")
        if self.name == "ReduceLROnPlateau" and self.per == "step":
            raise ValueError("ReduceLROnPlateau looks at a figure of the whole epoch; leave out per")
        return self

    @property
    def arguments(self) -> set[str]:
        """The names of the options that the class of torch is made with."""
        left_out = [LENGTHS[self.name]] if self.name in LENGTHS else []
        return {*self.options, *left_out, *(["max_lr"] if self.name == "OneCycleLR" else [])}
