"""How a choice among models is made: what may be demanded of them, and the table of what became of each."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from heliostat.core.model import NonNegative, Positive, Spec
from heliostat.core.stage import ConfigView
from heliostat.errors import nearest
from heliostat.stages.checks import check_metric

if TYPE_CHECKING:
    from heliostat.compression.pareto import Choice

DIGITS = 6


class Demands(Spec):
    """The limits that a model has to keep to, and the costs to make small within them.

    `max_drop`: how much worse than the baseline it may be, in the metric's own unit.
    """

    max_drop: dict[str, NonNegative] = Field(default_factory=dict)
    max_size_mb: Positive | None = None
    max_latency_ms: Positive | None = None
    """At batch 1, on one thread."""
    minimize: tuple[str, ...] = Field(default=("latency_ms", "size_mb"), min_length=1)

    @property
    def at_most(self) -> dict[str, float]:
        """The largest value of each cost that has a limit."""
        limits = {"size_mb": self.max_size_mb, "latency_ms": self.max_latency_ms}
        return {metric: value for metric, value in limits.items() if value is not None}


def check_demands(config: Demands, view: ConfigView, *, costs: Sequence[str]) -> Iterator[str]:
    """Whether models are measured for what is demanded; `costs` are those that may be made small."""
    for metric in config.max_drop:
        yield from check_metric(metric, view, place=f"config.max_drop.{metric}", splits=("val",))
    for index, cost in enumerate(config.minimize):
        if cost not in costs:
            yield f"config.minimize[{index}]: no model is measured for {cost!r}{nearest(cost, costs)}"


def candidates_table(
    base: Mapping[str, float],
    models: Mapping[str, Mapping[str, float]],
    choice: "Choice",
    *,
    modes: Mapping[str, Literal["max", "min"]],
) -> list[dict[str, Any]]:
    """One row a model, the baseline first: its figures, how they compare with those of `base`, and what became of it.

    `models` are the metrics of each by name, those of the baseline among them.
    """
    from heliostat.compression.pareto import told_apart

    sampled = [metric for metric in modes if f"{metric}_low" in base]
    return [
        {
            "model": verdict.name,
            "chosen": verdict.chosen,
            "why": verdict.reason,
            "on_front": verdict.on_front,
            "speed_up": round(base["latency_ms"] / models[verdict.name]["latency_ms"], DIGITS),
            "size_ratio": round(models[verdict.name]["size_mb"] / base["size_mb"], DIGITS),
            "quality": {
                metric: told_apart(models[verdict.name], base, metric, mode=modes[metric])
                for metric in sampled
                if f"{metric}_low" in models[verdict.name]
            },
            "metrics": dict(models[verdict.name]),
        }
        for verdict in choice.verdicts
    ]
