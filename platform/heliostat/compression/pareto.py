"""Choosing among models: which one is best within the limits. Pure arithmetic on metrics.

A row is a mapping of metric names to numbers. The quality of a model is limited (`max_drop`), its cost is made small
(`minimize`). The test split is looked at once: a metric that starts with `test_` is never chosen by.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from heliostat.core.objective import Mode, Objectives
from heliostat.errors import SpecError, StageError, nearest

Row = Mapping[str, float]

ROUNDING = 1e-9
"""0.98 - 0.97 is not quite 0.01: a drop may pass its limit by this much."""


@dataclass(frozen=True)
class Verdict:
    """What became of one model."""

    name: str
    chosen: bool
    within_limits: bool
    on_front: bool
    """Whether no other model is at least as good in every metric of `max_drop` and `minimize`, and better in one."""
    score: float | None
    """Geometric mean of the ratios to the baseline: 0.2 is five times better. None if a figure is missing."""
    reason: str


@dataclass(frozen=True)
class Choice:
    """The name of the chosen model, and a verdict on each: the baseline first, then the candidates as given."""

    chosen: str
    verdicts: tuple[Verdict, ...]


def choose(
    baseline: tuple[str, Row],
    candidates: Mapping[str, Row],
    *,
    max_drop: Mapping[str, float],
    minimize: Sequence[str],
    directions: Mapping[str, Mode] | None = None,
) -> Choice:
    """The best model whose quality stays within `max_drop` of the baseline's.

    Best is the smallest geometric mean, over `minimize`, of the ratios to the baseline: halving the size counts as much
    as halving the latency, whatever their units. On a tie the better quality wins, then the one that comes first. The
    baseline takes part, so that there is always an answer. A candidate with a missing or non-finite figure is not
    chosen, and its verdict says so.

    Args:
        baseline: name and metrics of the model that the others are compared with; it may also be among `candidates`.
        max_drop: for each quality metric, how much worse than the baseline's it may be (absolute, >= 0).
        minimize: the metrics to make small; positive numbers.
        directions: whether a quality metric is better when large (`max`, the default) or when small (`min`).

    Raises:
        SpecError: a metric that nobody reports, a `test_` metric, nothing to minimize, a negative drop.
        StageError: the baseline has no usable figure for one of the metrics.
    """
    base_name, base = baseline
    rows = {base_name: base} | {name: row for name, row in candidates.items() if name != base_name}
    _check_question(rows, max_drop, minimize)
    if fault := _fault(base, max_drop, minimize):
        raise StageError(f"the baseline {base_name}: {fault}")

    faults = {name: _fault(row, max_drop, minimize) for name, row in rows.items()}
    usable = {name: row for name, row in rows.items() if faults[name] is None}
    modes: dict[str, Mode] = {metric: (directions or {}).get(metric, "max") for metric in max_drop}
    costs: dict[str, Mode] = dict.fromkeys(minimize, "min")
    objectives = Objectives.of(costs | modes)
    sign = {metric: 1 if mode == "max" else -1 for metric, mode in modes.items()}
    drops = {name: {m: sign[m] * (base[m] - row[m]) for m in max_drop} for name, row in usable.items()}
    scores = {
        name: math.prod(row[m] / base[m] for m in minimize) ** (1 / len(minimize)) for name, row in usable.items()
    }
    within = [name for name in usable if all(drops[name][m] <= limit + ROUNDING for m, limit in max_drop.items())]
    front = objectives.front(usable)
    ranked = sorted(within, key=lambda name: (scores[name], sum(drops[name].values())))
    chosen = ranked[0]

    def reason(name: str) -> str:
        if fault := faults[name]:
            return fault
        if name not in within:
            over = [m for m, limit in max_drop.items() if drops[name][m] > limit + ROUNDING]
            verb = {m: "dropped" if modes[m] == "max" else "raised" for m in over}
            return ", ".join(f"{verb[m]} {m} by {drops[name][m]:.4g} > {max_drop[m]:.4g}" for m in over)
        if name == chosen:
            return f"chosen: {_why_chosen(rows[name], base, minimize, only_baseline=name == base_name)}"
        for other in ranked:
            if objectives.costs(rows[other]).dominates(objectives.costs(rows[name])):
                gains = [m for m in (*minimize, *max_drop) if rows[other][m] != rows[name][m]]
                return f"dominated by {other} (better {', '.join(gains)})"
        return f"score {scores[name]:.3g} vs {scores[chosen]:.3g} of {chosen}"

    return Choice(
        chosen=chosen,
        verdicts=tuple(
            Verdict(name, name == chosen, name in within, name in front, scores.get(name), reason(name))
            for name in rows
        ),
    )


def _check_question(rows: Mapping[str, Row], max_drop: Mapping[str, float], minimize: Sequence[str]) -> None:
    if not minimize:
        raise SpecError("minimize is empty: name at least one metric, such as size_mb")
    known = {metric for row in rows.values() for metric in row if not metric.startswith("test_")}
    for place, metrics in (("max_drop", max_drop), ("minimize", minimize)):
        for metric in metrics:
            if metric.startswith("test_"):
                raise SpecError(f"{place}: {metric!r} is a test figure; nothing is chosen by the test split")
            if metric not in known:
                raise SpecError(f"{place}: no model reports {metric!r}{nearest(metric, known)}")
    if both := set(max_drop) & set(minimize):
        raise SpecError(f"{', '.join(sorted(both))} is both in max_drop and in minimize")
    for metric, limit in max_drop.items():
        if not limit >= 0:
            raise SpecError(f"max_drop.{metric}: {limit} is not 0 or more")


def _fault(row: Row, max_drop: Mapping[str, float], minimize: Sequence[str]) -> str | None:
    for metric in (*max_drop, *minimize):
        if metric not in row:
            return f"has no {metric}"
        if not math.isfinite(row[metric]):
            return f"{metric} is {row[metric]}"
    for metric in minimize:
        if row[metric] <= 0:
            return f"{metric} is {row[metric]:g}, so it has no ratio to the baseline"
    return None


def _why_chosen(row: Row, base: Row, minimize: Sequence[str], *, only_baseline: bool) -> str:
    if only_baseline:
        return "the baseline; no candidate within the limits is better"
    return ", ".join(f"{m} {base[m] / row[m]:.3g}x better" for m in minimize)
