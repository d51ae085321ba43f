"""Mixed precision: the layers that int8 costs too much stay in float.

Each layer is tried alone in int8, and the worst ones are then left in float, one after another, until what the whole
network loses is within the limits.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from heliostat.errors import StageError

Drops = Mapping[str, float]
"""How much worse each metric is than the float model's, in its own unit; better is below 0."""


@dataclass(frozen=True)
class Mix:
    left_in_float: tuple[str, ...]
    drops: Drops
    """Of the mix."""
    alone: Mapping[str, Drops]
    """Of each layer when it alone is in int8; empty if there was no need to look."""


def mix_precision(
    layers: Sequence[str],
    drops_with: Callable[[Sequence[Sequence[str]]], Sequence[Drops]],
    *,
    max_drop: Mapping[str, float],
) -> Mix:
    """The fewest layers in float, worst first, that keep every drop within its limit.

    `drops_with([left_in_float, ...])` quantizes the other layers and measures, on validation, for each of these mixes.
    It is asked for all layers in int8, and if that is not within the limits for each layer alone, in one go; then for
    one more layer in float each time.

    Raises:
        StageError: the limits are not kept even with a single layer in int8.
    """

    def excess(drops: Drops) -> float:
        return max(drops[metric] - limit for metric, limit in max_drop.items())

    (everywhere,) = drops_with([[]])
    if excess(everywhere) <= 0:
        return Mix((), everywhere, {})
    alone = dict(zip(layers, drops_with([[other for other in layers if other != layer] for layer in layers])))
    worst_first = sorted(layers, key=lambda layer: excess(alone[layer]), reverse=True)
    for count in range(1, len(layers)):
        left = tuple(worst_first[:count])
        (drops,) = drops_with([left])
        if excess(drops) <= 0:
            return Mix(left, drops, alone)
    limits = ", ".join(f"{metric} {limit:g}" for metric, limit in max_drop.items())
    raise StageError(f"no mix of int8 and float keeps within max_drop ({limits}): {dict(everywhere)} with all in int8")
