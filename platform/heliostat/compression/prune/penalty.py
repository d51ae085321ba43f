"""Penalties that make a network sparse while it trains: at their minimum whole weights, or channels, are nothing.

An optimizer such as Adam brings what is not needed near zero but not onto it, so a training with a penalty is followed
by a cut at a threshold (`masks.below`, `structured(threshold=...)`).
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from heliostat.compression.layers import skipped
from heliostat.compression.prune.coupling import couplings
from heliostat.compression.prune.graph import Channels, dependencies, ready_to_trace, trains_more
from heliostat.compression.prune.masks import prunable_weights
from heliostat.compression.prune.plan import cuttable
from heliostat.errors import StageError

Penalty = Callable[[], Tensor]


def l1(model: nn.Module, *, skip: Sequence[str] = ()) -> Penalty:
    """The sum of |w| over the weights that `masks` prunes (Tibshirani 1996). Call what is returned at every step.

    Raises SpecError for a pattern that matches no layer, and StageError when there are no such weights.
    """
    names = list(prunable_weights(model, skip)[0])
    return lambda: sum((model.get_parameter(name).abs().sum() for name in names), start=0)  # type: ignore[return-value]


def group_lasso(model: nn.Module, *, example: Tensor, skip: Sequence[str] = ()) -> Penalty:
    """The sum, over channels, of sqrt(n) times the L2 norm of the n weights that go when the channel goes (Yuan and Lin
    2006), coupled layers together: a channel fades in all of them at once. Call what is returned at every step.

    Raises SpecError for a pattern that matches no layer, and StageError when no channel may be removed.
    """
    names = cuttable(model, example=example, score="size", skip=skip)
    if not names:
        raise StageError("there is no channel that a group lasso could remove")
    training = trains_more(model, example[:1])
    with ready_to_trace(model):
        graph = dependencies(model, example[:1], training=training)
        groups, _ = couplings(graph, skipped(model, skip))
        channels = [Channels(graph, part.group) for name in names for part in (groups[name], *groups[name].alike)]

    def penalty() -> Tensor:
        norms = [group.rms() for group in channels]
        return sum(((rms * counts).sum() for rms, counts in norms), start=0)  # type: ignore[return-value]

    return penalty
