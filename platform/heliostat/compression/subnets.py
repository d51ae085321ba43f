"""Sub-networks that share the weights of a larger one: each parameter is the leading slice of the one of its name.

So a network may be narrower (slices), or shallower (parameters left out), and needs no layers of its own kind for it
(Yu et al. 2019, https://arxiv.org/abs/1812.08928). Statistics of batch norm are not shared: each sub-network has
activations of its own, of which they are taken anew (Yu and Huang 2019, https://arxiv.org/abs/1903.05134).
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

Shapes = Mapping[str, tuple[int, ...]]


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of its parameters, by name."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def why_no_subnet(small: Shapes, large: Shapes) -> str | None:
    """Why a network of these shapes cannot have the leading slices of the large one's parameters; None if it can."""
    for name, shape in small.items():
        if name not in large:
            return f"the parameter {name!r} {shape} is not there in the largest network"
        of = large[name]
        if len(shape) != len(of) or any(mine > theirs for mine, theirs in zip(shape, of)):
            return f"the parameter {name!r} {shape} is no slice of the largest network's {of}"
    return None


def why_confused(small: Shapes, large: Shapes) -> str | None:
    """Why the names may not mean the same layers: one dimension both leaves layers out and makes others smaller."""
    left_out = [name for name in large if name not in small]
    narrower = [name for name, shape in small.items() if shape != large[name]]
    if not (left_out and narrower):
        return None
    return (
        f"it leaves out {left_out[0]!r} and makes {narrower[0]!r} {small[narrower[0]]} of {large[narrower[0]]}, "
        "which may be another layer then; keep what a depth leaves out in a container of its own, the last ones going"
    )


def forward(subnet: nn.Module, supernet: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """The sub-network's outputs with its slices of the supernet's parameters, into which the gradients flow."""
    shared = {name: _slice(supernet[name], parameter) for name, parameter in subnet.named_parameters()}
    outputs: Tensor = functional_call(subnet, shared, (inputs,))
    return outputs


def take_weights(subnet: nn.Module, supernet: Mapping[str, Tensor]) -> None:
    """Copy the sub-network's slices of the supernet's parameters into its own."""
    with torch.no_grad():
        for name, parameter in subnet.named_parameters():
            parameter.copy_(_slice(supernet[name], parameter))


def recalibrate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Take the statistics of all batch norms anew, as means over the batches of inputs; the model ends in eval mode."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    model.eval()
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a mean over all batches
        norm.train()
    with torch.no_grad():
        for inputs in batches:
            model(inputs)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
        norm.eval()


def _slice(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor[tuple(slice(size) for size in like.shape)]
