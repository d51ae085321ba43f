"""From the config's words to `torch.optim` objects."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from heliostat.training.config import OptimizerConfig, SchedulerConfig

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
    fast: dict[str, Any] = {"fused": True} if config.name in FUSED else {"foreach": True}
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    return OPTIMIZERS[config.name](trainable, **config.options, **fast)


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: SchedulerConfig, *, epochs: int, steps_per_epoch: int
) -> LambdaLR:
    """The learning rate by optimizer step: linear warm-up, then the config's shape down to zero at the end."""
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
            case "constant":
                return 1.0

    return LambdaLR(optimizer, factor)
