"""From the config's words to `torch.optim` objects."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from heliostat.core.imports import resolve
from heliostat.errors import SpecError
from heliostat.training.config import OptimizerConfig, SchedulerConfig
from heliostat.training.schedule_config import LENGTHS, SHAPES
from heliostat.training.strategies.gradients import is_spread

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}
FUSED = frozenset({"sgd", "adam", "adamw", "adagrad"})
"""Those with one kernel for all parameters on CPU too (Adam's step: 0.34 ms against 1.6 ms on a small CNN)."""


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer over the parameters that are not frozen, in its fastest implementation."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if config.is_reference:
        own: torch.optim.Optimizer = resolve(config.name)(trainable, **config.arguments)
        return own
    spread = [parameter for parameter in trainable if is_spread(parameter)]
    whole = [parameter for parameter in trainable if not is_spread(parameter)]
    is_fused = config.name in FUSED and not spread and all(_fits_fused_kernel(parameter) for parameter in whole)
    fast: dict[str, Any] = {"fused": True} if is_fused else {"foreach": True}
    groups = [{"params": group} for group in (whole, spread) if group]  # one kernel takes only tensors of one kind
    return OPTIMIZERS[config.name](groups, **config.arguments, **fast)


def _fits_fused_kernel(parameter: nn.Parameter) -> bool:
    """Whether it is real and in one piece of memory: of another parameter the kernels on CPU read the wrong numbers."""
    in_order = sorted(range(parameter.dim()), key=parameter.stride, reverse=True)
    return not parameter.is_complex() and parameter.permute(in_order).is_contiguous()


@torch.no_grad()
def match_layout(optimizer: torch.optim.Optimizer) -> None:
    """Give what an optimizer keeps of each parameter the parameter's layout.

    Torch's fused kernels on CPU read both as one piece of memory each: another order of strides is silently wrong.
    """
    for parameter, kept in optimizer.state.items():
        for name, value in kept.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                kept[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


class Schedule:
    """The learning rate of a fit, whatever sets it. The loop says when a step and when an epoch is over."""

    def __init__(self, scheduler: LRScheduler, *, per: str) -> None:
        self._scheduler = scheduler
        self._per = per

    @property
    def lr(self) -> float:
        """The rate of the next step, of the first parameter group."""
        return float(self._scheduler.get_last_lr()[0])

    def step_over(self) -> None:
        if self._per == "step":
            self._scheduler.step()

    def epoch_over(self, figure: float) -> None:
        """`figure` is the monitored one."""
        if isinstance(self._scheduler, ReduceLROnPlateau):
            self._scheduler.step(figure)
        elif self._per == "epoch":
            self._scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return self._scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scheduler.load_state_dict(state)


def build_schedule(
    optimizer: torch.optim.Optimizer,
    config: SchedulerConfig,
    *,
    epochs: int,
    steps_per_epoch: int | None,
    mode: str = "min",
) -> Schedule:
    """The schedule that the config describes; `mode` is the direction of the monitored figure.

    Raises SpecError when warm-up or decay needs the number of steps and the data has no length, and for options that
    the class of torch does not take.
    """
    if config.name not in SHAPES:
        options = _with_length(config, optimizer, epochs=epochs, steps_per_epoch=steps_per_epoch)
        is_plateau = config.name == "ReduceLROnPlateau"
        try:
            scheduler = getattr(lr_scheduler, config.name)(
                optimizer, **({"mode": mode} if is_plateau else {}) | options
            )
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise SpecError(f"scheduler.options: {config.name}: {error}") from None
        return Schedule(scheduler, per="epoch" if is_plateau else config.per)
    if steps_per_epoch is None:
        if config.name != "constant" or config.warmup_epochs:
            raise SpecError(
                f"scheduler: {config.name!r} with warmup_epochs={config.warmup_epochs:g} needs the number of steps, "
                "and the training data has no length; set steps_per_epoch"
            )
        steps_per_epoch = 1
    warmup_steps = round(config.warmup_epochs * steps_per_epoch)
    decay_steps = max(1, epochs * steps_per_epoch - warmup_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        done = min(1.0, (step - warmup_steps) / decay_steps)
        match config.name:
            case "cosine":
                return 0.5 * (1 + math.cos(math.pi * done))
            case "linear":
                return 1 - done
            case _:
                return 1.0

    return Schedule(LambdaLR(optimizer, factor), per="step")


def _with_length(
    config: SchedulerConfig, optimizer: torch.optim.Optimizer, *, epochs: int, steps_per_epoch: int | None
) -> dict[str, Any]:
    """The scheduler's options, with the length of the training where that was left out.

    Raises SpecError for a length that is not known, or that `OneCycleLR`, which fails after it, would not last for.
    """
    name, options = LENGTHS.get(config.name, ""), dict(config.options)
    length = epochs if config.per == "epoch" else steps_per_epoch and epochs * steps_per_epoch
    if config.name == "OneCycleLR":
        options.setdefault("max_lr", [group["lr"] for group in optimizer.param_groups])
        if "epochs" in options and "steps_per_epoch" in options:
            options["total_steps"] = options.pop("epochs") * options.pop("steps_per_epoch")
        given = options.get("total_steps")
        if given is not None and length is not None and given < length:
            raise SpecError(
                f"scheduler.options: OneCycleLR ends after {given} steps and would fail then, but is stepped {length} "
                f"times, once {'an epoch' if config.per == 'epoch' else 'a step'}; leave total_steps out"
            )
    if not name or options.get(name) is not None:
        return options
    if length is None:
        raise SpecError(
            f"scheduler.options.{name}: the training data has no length that it could be; give it, or steps_per_epoch"
        )
    return {**options, name: length}
