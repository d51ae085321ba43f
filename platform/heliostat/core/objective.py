"""What makes one trial, or one model, better than another: objectives, the first of which leads, within limits.

Figures are mappings from metric to number. They are compared as costs, of which less is always better.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Mode = Literal["max", "min"]
Figures = Mapping[str, float]


@dataclass(frozen=True)
class Objective:
    """A metric, and whether more or less of it is better."""

    metric: str
    mode: Mode


@dataclass(frozen=True)
class Bound:
    """A metric that is to be at most `value`; at least, where more of it is better."""

    metric: str
    value: float
    mode: Mode

    def excess(self, figures: Figures) -> float:
        """How far the metric is beyond the bound, as a part of the bound; zero or less is within."""
        beyond = figures[self.metric] - self.value
        return (beyond if self.mode == "min" else -beyond) / (abs(self.value) or 1.0)

    def __str__(self) -> str:
        return f"{self.metric} at {'most' if self.mode == 'min' else 'least'} {self.value:g}"


@dataclass(frozen=True)
class Costs:
    """Figures turned so that less is better, in the order of the objectives."""

    objectives: tuple[float, ...]
    excess: tuple[float, ...] = ()
    """How far each limit is passed; zero or less is within."""

    @property
    def within(self) -> bool:
        """Whether every limit is kept."""
        return all(excess <= 0 for excess in self.excess)

    def dominates(self, other: "Costs") -> bool:
        """Whether these are nowhere worse and somewhere better."""
        pairs = list(zip(self.objectives, other.objectives, strict=True))
        return all(mine <= theirs for mine, theirs in pairs) and any(mine < theirs for mine, theirs in pairs)


@dataclass(frozen=True)
class Objectives:
    """One objective or several. The first leads; equals in that are told apart by the next, and so on."""

    ordered: tuple[Objective, ...]
    limits: tuple[Bound, ...] = ()
    """What is beyond one of them is neither the best nor on the front."""

    @staticmethod
    def of(modes: Mapping[str, Mode], *limits: Bound) -> "Objectives":
        """`Objectives.of({"val_accuracy": "max", "latency_ms": "min"}, Bound("size_mb", 0.5, "min"))`."""
        return Objectives(tuple(Objective(metric, mode) for metric, mode in modes.items()), limits)

    @property
    def first(self) -> Objective:
        return self.ordered[0]

    @property
    def metrics(self) -> list[str]:
        """What figures must have to be compared."""
        return list(dict.fromkeys([*(one.metric for one in self.ordered), *(limit.metric for limit in self.limits)]))

    def costs(self, figures: Figures) -> Costs:
        return Costs(
            tuple(figures[o.metric] if o.mode == "min" else -figures[o.metric] for o in self.ordered),
            tuple(limit.excess(figures) for limit in self.limits),
        )

    def figures(self, rows: Iterable[Figures]) -> Figures:
        """What a trial is judged by: of the rows that have every metric, the first with the best first objective.

        Not every epoch need report them all. Empty when none does; not a number is not a figure.
        """
        complete = [row for row in rows if not any(math.isnan(row.get(metric, math.nan)) for metric in self.metrics)]
        return min(complete, key=lambda row: self.costs(row).objectives[0], default={})

    def best(self, rows: Mapping[str, Figures]) -> str | None:
        """The name of the best within the limits; of equals, the first. None where there is none."""
        costs = self._within(rows)
        return min(costs, key=lambda name: costs[name].objectives, default=None)

    def front(self, rows: Mapping[str, Figures]) -> list[str]:
        """The names of those within the limits that none of them dominates, in the order given: the Pareto set.

        Equals are all on it.
        """
        costs = self._within(rows)
        found: list[str] = []
        for name in sorted(costs, key=lambda name: costs[name].objectives):  # what dominates comes before
            if not any(costs[other].dominates(costs[name]) for other in found):
                found.append(name)
        return [name for name in rows if name in set(found)]

    def closest(self, rows: Mapping[str, Figures]) -> str:
        """The name of what is least beyond the limits, over all of them."""
        return min(rows, key=lambda name: sum(max(0.0, excess) for excess in self.costs(rows[name]).excess))

    def _within(self, rows: Mapping[str, Figures]) -> dict[str, Costs]:
        costs = {name: self.costs(row) for name, row in rows.items()}
        return {name: cost for name, cost in costs.items() if cost.within}
