"""Large falls: a model that is much worse than the one it was made of is nothing to report as done without a word.

A metric has fallen if it is worse by more than a few hundredths of its value and the 95 % intervals do not overlap. A
loss has if it is many times what it was: confident networks double theirs under any rounding and decide the same.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from heliostat.core.artifact import Artifact

if TYPE_CHECKING:
    from heliostat.core.plan import Node

METRIC = 0.03
"""Of the larger figure. Without intervals it has to be `METRIC_ALONE`."""
METRIC_ALONE = 0.1
LOSS_TIMES = 2.0
"""The factor by which a loss may rise where the task has no metric; beside a metric `LOSS_TIMES_BESIDE`."""
LOSS_TIMES_BESIDE = 3.0
NAMED = 3
SLOTS = ("model", "teacher")
"""Of the inputs, those that a model is made of."""

Mode = Literal["max", "min"]


def falls_of(
    node: "Node",
    inputs: Mapping[str, Sequence[Artifact]],
    metrics: Mapping[str, float],
    details: Mapping[str, Any],
    *,
    modes: Mapping[str, Mode],
) -> Iterator[str]:
    """A warning for each model that went into a node and that what came out of it is far worse than."""
    for source in (artifact for slot in SLOTS for artifact in inputs.get(slot, ())):
        if falls := list(large_falls(metrics, source.metrics, modes)):
            can_mix = getattr(node.config, "method", None) in ("static", "qat") and node.uses == "quantize"
            advice = "; max_drop tries what helps: other ranges, layers in float, dynamic" if can_mix else ""
            errors = details.get("rounding_errors", ())
            yield in_words(falls, source=source.node, errors=errors, advice=advice)


def large_falls(
    metrics: Mapping[str, float], before: Mapping[str, float], modes: Mapping[str, Mode]
) -> Iterator[tuple[str, float, float]]:
    """The figures of `val` that fell far: name, what it was and what it is."""
    names = [name for name in modes if name.startswith("val_") and name in metrics and name in before]
    losses = [name for name in names if name.endswith("_loss")]
    for name in names:
        was, now = before[name], metrics[name]
        if not math.isfinite(was):
            continue
        if not math.isfinite(now):
            yield name, was, now
            continue
        worse = was - now if modes[name] == "max" else now - was
        if name in losses:
            times = LOSS_TIMES if losses == names else LOSS_TIMES_BESIDE
            large = worse > (times - 1) * abs(was) and worse > 1e-3
        else:
            large = _metric_fell(name, worse, metrics, before, mode=modes[name])
        if large:
            yield name, was, now


def _metric_fell(
    name: str, worse: float, metrics: Mapping[str, float], before: Mapping[str, float], *, mode: Mode
) -> bool:
    size = max(abs(metrics[name]), abs(before[name]))
    ends = [figures.get(f"{name}_{end}") for figures in (metrics, before) for end in ("low", "high")]
    if any(end is None or not math.isfinite(end) for end in ends):
        return worse > METRIC_ALONE * size
    low, high, low_before, high_before = ends
    apart = high < low_before if mode == "max" else low > high_before  # type: ignore[operator]
    return worse > METRIC * size and apart


def in_words(
    falls: Sequence[tuple[str, float, float]], *, source: str, errors: Sequence[Mapping[str, Any]], advice: str
) -> str:
    """The warning: what fell, which layers are to blame where `errors` of rounding tell, and what to do."""
    figures = ", ".join(f"{name} {was:.4g} -> {now:.4g}" for name, was, now in falls)
    text = f"a large fall from {source}: {figures}"
    if errors:
        named = ", ".join(f"{row['layer']} ({row['sqnr_db']:.0f} dB)" for row in errors[:NAMED])
        text += f"; rounding harms most what {named} gives, where 30 dB of signal to noise are usual"
    return text + advice
