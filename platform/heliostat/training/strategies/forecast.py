"""What `auto` would take, before anything runs: by a model without weights, and by the devices of this machine."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from heliostat.core.credentials import revealed
from heliostat.training.config import TrainConfig
from heliostat.training.devices import Device, shared, whole_device
from heliostat.training.lazy import lazy_layers
from heliostat.training.losses import LossRule
from heliostat.training.memory import Activations, activations
from heliostat.training.strategies.auto import weigh


def on_meta(build_model: Callable[..., Any], config: TrainConfig) -> nn.Module | str:
    """The model without weights, or why it cannot be made so: training will then tell."""
    try:
        with torch.device("meta"):
            model = build_model(**revealed(config.model_args, place="model_args"))
    except Exception as error:  # a model function may need real tensors
        return f"known when it trains ({type(error).__name__}: {error})"
    if not isinstance(model, nn.Module):
        return f"not known: task.model gives {type(model).__name__}, no module"
    if lazy := lazy_layers(model):
        return f"known when it trains (the data says the sizes of {', '.join(lazy)})"
    return model


def forecast(
    build_model: Callable[..., Any],
    config: TrainConfig,
    *,
    workers: int,
    gpus_per_worker: float,
    own_step: bool,
    own_loop: bool = False,
) -> Mapping[str, str]:
    """What `auto` would take on this machine, the reason, and the memory that it goes by."""
    model = on_meta(build_model, config)
    if isinstance(model, str):
        return {"strategy": f"auto; what it takes is {model}"}
    devices = _devices_here(workers, gpus_per_worker)
    if not devices:
        return {"strategy": "auto; what it takes is known when it trains: this machine has no GPU to go by"}
    found = None if own_loop else _activations(model, config, own_step=own_step)
    choice = weigh(model, config, devices, found, own_step=own_step, own_loop=own_loop)
    missing = "; the activations, for which strategy.auto.sample would do, are counted when it trains"
    if own_loop:
        missing = "; of task.train_fn it knows the weights alone, and config.optimizer, but not what it computes"
    elif found:
        missing = ""
    return {
        "strategy": f"auto takes {choice.mesh} on this machine: {choice.reason}{missing}",
        "memory of a worker": "\n" + choice.table(),
    }


def _devices_here(workers: int, gpus_per_worker: float) -> tuple[Device, ...]:
    """What each worker would have if all were here; nothing where it would be a GPU and there is none."""
    if not gpus_per_worker:
        return shared([whole_device(torch.device("cpu"))] * workers)
    gpus = [whole_device(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]
    return shared([gpus[rank % len(gpus)] for rank in range(workers)]) if gpus else ()


def _activations(model: nn.Module, config: TrainConfig, *, own_step: bool) -> Activations | None:
    """Of a sample as the config describes it, on the meta device; None where it does not, or the task has its own step.

    The loss, for which there are no targets, is the sum of the outputs.
    """
    sample = config.strategy.auto
    if sample.sample is None or own_step:
        return None
    inputs = torch.zeros(1, *sample.sample, dtype=getattr(torch, sample.dtype), device="meta")
    rule = LossRule(lambda outputs, batch: outputs.sum(), precision=config.precision, device=torch.device("cpu"))
    return activations(model, (inputs,), rule)
