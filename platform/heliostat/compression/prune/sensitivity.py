"""How far each layer may be pruned, from what pruning it alone costs (Han et al. 2015, https://arxiv.org/abs/1506.02626;
Li et al. 2017, https://arxiv.org/abs/1608.08710).

Every layer is pruned until it alone costs as much as any other: what costs little goes far, what costs much stays.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

BISECTIONS = 60

Harms = Mapping[str, Sequence[tuple[float, float]]]
"""For each layer, its sparsities that were tried, rising, each with what the loss rose by."""


def spread(harms: Harms, sizes: Mapping[str, int], total: float) -> dict[str, float]:
    """The sparsity of each layer at which all cost alike, and which make `total` of the whole network.

    A layer's harm is read off the straight lines between the sparsities tried, of which none is more harmless than a
    smaller one. A layer ends at the highest tried, so a `total` beyond all of those cannot be reached.

    Args:
        sizes: what each layer has that can go: weights, or channels.
    """
    curves = {layer: _curve(points) for layer, points in harms.items()}
    size = sum(sizes[layer] for layer in curves)
    low, high = 0.0, max(float(costs[-1]) for _, costs in curves.values())
    found: dict[str, float] = {}
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        found = {layer: float(np.interp(middle, costs, tried)) for layer, (tried, costs) in curves.items()}
        if sum(sizes[layer] * sparsity for layer, sparsity in found.items()) < total * size:
            low = middle
        else:
            high = middle
    return found


def most(harms: Harms, sizes: Mapping[str, int]) -> float:
    """The sparsity of the whole network with every layer at the highest that was tried."""
    return sum(sizes[layer] * points[-1][0] for layer, points in harms.items()) / sum(sizes[layer] for layer in harms)


def _curve(points: Sequence[tuple[float, float]]) -> tuple[Any, Any]:
    """Sparsities from 0, and costs that rise with each, be it by next to nothing: then a cost has one sparsity."""
    tried = np.array([0.0, *(sparsity for sparsity, _ in points)])
    costs = np.maximum.accumulate([0.0, *(harm for _, harm in points)])
    return tried, costs + 1e-9 * tried
