"""The proof of a cut: on real data, the network that is left computes what the masked network does.

A masked network has every shape of the original, and zero in all that a cut takes away: the weights that make a channel
and those that read it.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from heliostat.compression.parametrizations import copied
from heliostat.compression.proof import why_apart
from heliostat.compression.prune.steps import Positions, cut
from heliostat.errors import StageError


def proven_cut(
    model: nn.Module, step: Mapping[str, Any], rows: Tensor, *, norms: Sequence[str] = ()
) -> tuple[nn.Module, str | None]:
    """Return a copy of `model` after the step, and why it is not the masked network on `rows`; None if it is.

    `norms` normalise over channels of which some go: in the masked network they do so over the remaining ones.
    """
    try:
        smaller, positions = cut(model, step)
    except StageError as error:
        return model, f"{error}"
    except Exception as error:  # the library's arithmetic fails in many ways
        return model, f"torch-pruning cannot remove its channels: {type(error).__name__}: {error}"
    reference = masked(model, positions, norms)
    return smaller, why_apart(copied(smaller), reference, rows, having="with fewer channels", like="the masked network")


def masked(model: nn.Module, positions: Positions, norms: Sequence[str] = ()) -> nn.Module:
    """Return a copy of `model` with zero wherever its parameters are not among the positions that stay."""
    copy = copied(model)
    parameters = dict(copy.named_parameters(remove_duplicate=False))
    for name, where in positions.items():
        stays = torch.zeros(parameters[name].numel(), dtype=torch.bool)
        stays[where.flatten()] = True
        parameters[name].data.masked_fill_(~stays.view(parameters[name].shape), 0)
    for name in norms:
        norm, weight = copy.get_submodule(name), positions.get(f"{name}.weight")
        if weight is not None:
            norm.forward = partial(_over_remaining, norm, weight)
    return copy


def _over_remaining(norm: nn.Module, channels: Tensor, inputs: Tensor) -> Tensor:
    """Layer norm, or group norm of one group, over some of the channels; the others are zero."""
    dim = -1 if isinstance(norm, nn.LayerNorm) else 1
    assert isinstance(norm, (nn.LayerNorm, nn.GroupNorm))
    weight, bias = (None if part is None else part[channels] for part in (norm.weight, norm.bias))
    remaining = inputs.index_select(dim, channels)
    if isinstance(norm, nn.LayerNorm):
        found = functional.layer_norm(remaining, (len(channels),), weight, bias, norm.eps)
    else:
        found = functional.group_norm(remaining, 1, weight, bias, norm.eps)
    return torch.zeros_like(inputs).index_copy(dim, channels, found)
