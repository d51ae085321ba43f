"""Choosing among models: which one is best within the limits. Pure arithmetic on metrics.

A row is a mapping of metric names to numbers. The quality of a model is limited (`max_drop`), its cost is limited
(`at_most`) and made small (`minimize`). The test split is looked at once: a metric that starts with `test_` is never
chosen by.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from heliostat.core.objective import Bound, Mode, Objectives
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
    at_most: Mapping[str, float] | None = None,
    directions: Mapping[str, Mode] | None = None,
    baseline_competes: bool = True,
) -> Choice:
    """The best model within the limits: a quality within `max_drop` of the baseline's, and costs of `at_most` so much.

    Best is the smallest geometric mean, over `minimize`, of the ratios to the baseline: halving the size counts as much
    as halving the latency, whatever their units. On a tie the better quality wins, then the one that comes first. A
    candidate with a missing or non-finite figure is not chosen, and its verdict says so.

    Args:
        baseline: name and metrics of the model that the others are compared with; it may also be among `candidates`.
        max_drop: for each quality metric, how much worse than the baseline's it may be (absolute, >= 0).
        minimize: the metrics to make small; positive numbers.
        at_most: for each cost, how large it may be.
        directions: whether a quality metric is better when large (`max`, the default) or when small (`min`).
        baseline_competes: whether the baseline may be chosen.

    Raises:
        SpecError: a metric that nobody reports, a `test_` metric, nothing to minimize, a negative drop.
        StageError: the baseline has no usable figure for one of the metrics; no model is within the limits, and the
            message names the closest.
    """
    base_name, base = baseline
    rows = {base_name: base} | {name: row for name, row in candidates.items() if name != base_name}
    at_most = at_most or {}
    _check_question(rows, max_drop, minimize, at_most)
    asked = [*max_drop, *at_most, *minimize]
    if fault := _fault(base, asked, minimize):
        raise StageError(f"the baseline {base_name}: {fault}")

    faults = {name: _fault(row, asked, minimize) for name, row in rows.items()}
    usable = {name: row for name, row in rows.items() if faults[name] is None}
    modes: dict[str, Mode] = {metric: (directions or {}).get(metric, "max") for metric in max_drop}
    costs: dict[str, Mode] = dict.fromkeys(minimize, "min")
    objectives = Objectives.of(costs | modes)
    limits = bounds(base, max_drop=max_drop, at_most=at_most, directions=modes)
    sign = {metric: 1 if mode == "max" else -1 for metric, mode in modes.items()}
    drops = {name: {m: sign[m] * (base[m] - row[m]) for m in max_drop} for name, row in usable.items()}
    scores = {
        name: math.prod(row[m] / base[m] for m in minimize) ** (1 / len(minimize)) for name, row in usable.items()
    }
    over = {name: [limit for limit in limits if limit.excess(row) > 0] for name, row in usable.items()}
    competing = [name for name in usable if baseline_competes or name != base_name]
    front = objectives.front({name: usable[name] for name in competing})
    ranked = sorted(
        (name for name in competing if not over[name]), key=lambda name: (scores[name], sum(drops[name].values()))
    )

    def why_over(name: str) -> str:
        return ", ".join(
            f"{'dropped' if modes[m] == 'max' else 'raised'} {m} by {drops[name][m]:.4g} > {max_drop[m]:.4g}"
            if (m := limit.metric) in max_drop
            else f"{m} {usable[name][m]:.4g} > {limit.value:.4g}"
            for limit in over[name]
        )

    if not ranked:
        raise StageError(_none_within(competing, faults, usable, replace(objectives, limits=limits), why_over))
    chosen = ranked[0]

    def reason(name: str) -> str:
        if fault := faults[name]:
            return fault
        if over[name]:
            return why_over(name)
        if name == chosen:
            return f"chosen: {_why_chosen(rows[name], base, minimize, only_baseline=name == base_name)}"
        for other in ranked:
            if objectives.costs(rows[other]).dominates(objectives.costs(rows[name])):
                return _why_dominated(rows[name], (other, rows[other]), costs | modes)
        return f"score {scores[name]:.3g} vs {scores[chosen]:.3g} of {chosen}"

    return Choice(
        chosen=chosen,
        verdicts=tuple(
            Verdict(name, name == chosen, over.get(name) == [], name in front, scores.get(name), reason(name))
            for name in rows
        ),
    )


def bounds(
    base: Row, *, max_drop: Mapping[str, float], at_most: Mapping[str, float], directions: Mapping[str, Mode]
) -> tuple[Bound, ...]:
    """The limits as bounds of the figures themselves, `base` being those of the baseline."""
    found: list[Bound] = []
    for metric, drop in max_drop.items():
        mode, slack = directions.get(metric, "max"), drop + ROUNDING
        found.append(Bound(metric, base[metric] + (slack if mode == "min" else -slack), mode))
    return (*found, *(Bound(metric, value, "min") for metric, value in at_most.items()))


def told_apart(
    figures: Mapping[str, float], others: Mapping[str, float], metric: str, *, mode: Mode
) -> Literal["better", "worse", "not told apart"]:
    """What can be said of a model's `metric` beside another's: nothing where their intervals overlap.

    Both have the ends of their intervals, `{metric}_low` and `{metric}_high`, beside the figure.
    """
    above = figures[f"{metric}_low"] > others[f"{metric}_high"]
    below = figures[f"{metric}_high"] < others[f"{metric}_low"]
    if not (above or below):
        return "not told apart"
    return "better" if above == (mode == "max") else "worse"


def _none_within(
    competing: Sequence[str],
    faults: Mapping[str, str | None],
    usable: Mapping[str, Row],
    objectives: Objectives,
    why_over: Callable[[str], str],
) -> str:
    if not competing:
        return "no candidate has the figures to choose by: " + "; ".join(f"{n}: {f}" for n, f in faults.items() if f)
    closest = objectives.closest({name: usable[name] for name in competing})
    return f"none of {len(competing)} models is within the limits; the closest is {closest}: {why_over(closest)}"


def _check_question(
    rows: Mapping[str, Row], max_drop: Mapping[str, float], minimize: Sequence[str], at_most: Mapping[str, float]
) -> None:
    if not minimize:
        raise SpecError("minimize is empty: name at least one metric, such as size_mb")
    known = {metric for row in rows.values() for metric in row if not metric.startswith("test_")}
    for place, metrics in (("max_drop", max_drop), ("minimize", minimize), ("at_most", at_most)):
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


def _fault(row: Row, asked: Sequence[str], minimize: Sequence[str]) -> str | None:
    for metric in asked:
        if metric not in row:
            return f"has no {metric}"
        if not math.isfinite(row[metric]):
            return f"{metric} is {row[metric]}"
    for metric in minimize:
        if row[metric] <= 0:
            return f"{metric} is {row[metric]:g}, so it has no ratio to the baseline"
    return None


def _why_dominated(row: Row, by: tuple[str, Row], modes: Mapping[str, Mode]) -> str:
    """Which figures of the other model are better, as far as the samples that they are means of can tell."""
    name, other = by
    better: list[str] = []
    unsure: list[str] = []
    for metric, mode in modes.items():
        if row[metric] != other[metric]:
            sampled = f"{metric}_low" in row and f"{metric}_low" in other
            alike = sampled and told_apart(other, row, metric, mode=mode) == "not told apart"
            (unsure if alike else better).append(metric)
    told = [f"better {', '.join(better)}"] if better else []
    told += [f"{', '.join(unsure)} not told apart"] if unsure else []
    return f"{'dominated by' if better else 'in nothing better than'} {name} ({'; '.join(told)})"


def _why_chosen(row: Row, base: Row, minimize: Sequence[str], *, only_baseline: bool) -> str:
    if only_baseline:
        return "the baseline; no candidate within the limits is better"
    return ", ".join(f"{m} {base[m] / row[m]:.3g}x better" for m in minimize)
