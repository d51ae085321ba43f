"""The memory layout that convolutions are fastest in.

On a CPU a convolutional net trains 20 to 30 % faster with its weights in channels-last layout (measured on AVX2, widths
8 to 32); activations follow the weights by themselves. A model that calls `view` on an activation cannot run in it, as
only `reshape` copes with any layout, so it is tried on one sample first.
"""

from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from heliostat.training.batches import first_sample
from heliostat.training.world import World


def use_fast_layout(model: nn.Module, dataset: Dataset[Any], *, world: World) -> None:
    """Put a convolutional net on CPU into channels-last layout, if it runs in it; leave any other model alone."""
    if world.device.type != "cpu" or not any(parameter.dim() == 4 for parameter in model.parameters()):
        return
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(first_sample(dataset, world.device)[0])
    except RuntimeError:  # "view size is not compatible", or an error that the training will raise again
        use_plain_layout(model)
    model.train(was_training)


def use_plain_layout(model: nn.Module) -> None:
    """Undo `use_fast_layout`."""
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
