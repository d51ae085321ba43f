"""What makes one trial, or one model, better than another: objectives, the first of which leads.

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
class Costs:
    """Figures turned so that less is better, in the order of the objectives."""

    objectives: tuple[float, ...]

    def dominates(self, other: "Costs") -> bool:
        """Whether these are nowhere worse and somewhere better."""
        pairs = list(zip(self.objectives, other.objectives, strict=True))
        return all(mine <= theirs for mine, theirs in pairs) and any(mine < theirs for mine, theirs in pairs)


@dataclass(frozen=True)
class Objectives:
    """One objective or several. The first leads; equals in that are told apart by the next, and so on."""

    ordered: tuple[Objective, ...]

    @staticmethod
    def of(modes: Mapping[str, Mode]) -> "Objectives":
        """`Objectives.of({"val_accuracy": "max", "latency_ms": "min"})`."""
        return Objectives(tuple(Objective(metric, mode) for metric, mode in modes.items()))

    @property
    def first(self) -> Objective:
        return self.ordered[0]

    @property
    def metrics(self) -> list[str]:
        """What figures must have to be compared."""
        return [objective.metric for objective in self.ordered]

    def costs(self, figures: Figures) -> Costs:
        return Costs(tuple(figures[o.metric] if o.mode == "min" else -figures[o.metric] for o in self.ordered))

    def figures(self, rows: Iterable[Figures]) -> Figures:
        """What a trial is judged by: of the rows that have every metric, the first with the best first objective.

        Not every epoch need report them all. Empty when none does; not a number is not a figure.
        """
        complete = [row for row in rows if not any(math.isnan(row.get(metric, math.nan)) for metric in self.metrics)]
        return min(complete, key=lambda row: self.costs(row).objectives[0], default={})

    def best(self, rows: Mapping[str, Figures]) -> str | None:
        """The name of the best; of equals, the first. None where there are none."""
        return min(rows, key=lambda name: self.costs(rows[name]).objectives, default=None)

    def front(self, rows: Mapping[str, Figures]) -> list[str]:
        """The names of those that none dominates, in the order given: the Pareto set. Equals are all on it."""
        costs = {name: self.costs(row) for name, row in rows.items()}
        found: list[str] = []
        for name in sorted(costs, key=lambda name: costs[name].objectives):  # what dominates comes before
            if not any(costs[other].dominates(costs[name]) for other in found):
                found.append(name)
        return [name for name in rows if name in set(found)]
