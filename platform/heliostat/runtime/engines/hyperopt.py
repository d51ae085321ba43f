"""`bayesian`: tree-structured Parzen estimators (Bergstra et al., 2011) by HyperOpt, through Ray's HyperOptSearch.

A label is a dimension's way through the options of the space. An option goes through HyperOpt as its index: it would
make `{}` of lists and dicts. Of a whole number it draws a real one, whose floor is taken: its own whole numbers have
the ends half as often as the rest. It knows no limits: what is beyond one counts as worse than anything within.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from heliostat.core.objective import Costs
from heliostat.core.points import numbers_at
from heliostat.core.space import (
    Choice,
    Constant,
    Dimension,
    Grid,
    LogRandInt,
    LogUniform,
    Normal,
    QUniform,
    RandInt,
    Space,
    Uniform,
)
from heliostat.runtime.engines import Engine, EngineKind, startup_trials
from heliostat.runtime.engines.listed import make_random

INDEX = ""
"""Beside the labels, which are never empty, of what an option opens."""


def make_bayesian(space: Space, *, num_objectives: int, seed: int, trials: int) -> Engine:
    """The engine. A space of constants alone leaves HyperOpt nothing to model, so it is sampled."""
    from ray.tune.search.hyperopt import HyperOptSearch

    expressions = _to_hyperopt(space, "")
    if not expressions:
        return make_random(space, num_objectives=num_objectives, seed=seed, trials=trials)
    search = HyperOptSearch(
        expressions, metric="cost", mode="min", n_initial_points=startup_trials(trials), random_state_seed=seed
    )
    return _HyperOpt(space, search)


class _HyperOpt:
    def __init__(self, space: Space, search: Any) -> None:
        self._space, self._search = space, search

    def suggest(self, trial: str) -> dict[str, Any] | None:
        drawn = dict(_flat(self._search.suggest(trial)))
        return self._space.point(lambda label, dimension: drawn[label])

    def adopt(self, trial: str, point: Mapping[str, Any]) -> None:
        from hyperopt.fmin import generate_trial

        trials = self._search.get_state()["hyperopt_trials"]
        (tid,) = trials.new_trial_ids(1)
        numbers = numbers_at(self._space, point)
        adopted = generate_trial(tid, {label: _real(*numbers[label]) for label in numbers})
        for drawn in (adopted["misc"]["idxs"], adopted["misc"]["vals"]):
            drawn |= {label: [] for label in self._search.domain.params if label not in numbers}
        trials.insert_trial_docs([adopted])
        trials.refresh()
        self._search._live_trial_mapping[trial] = (tid, adopted)  # Ray has no other way to a point that is given

    def observe(self, trial: str, costs: Costs | None) -> None:
        result = None if costs is None else {"cost": costs.objectives[0] if costs.within else math.inf}
        self._search.on_trial_complete(trial, result=result, error=costs is None)


def _real(dimension: Dimension, number: Any) -> Any:
    """A real number whose floor is taken, where HyperOpt draws one: the middle of those."""
    return number + 0.5 if isinstance(dimension, RandInt | LogRandInt | QUniform) else number


def _to_hyperopt(space: Space, prefix: str) -> dict[str, Any]:
    return {
        f"{prefix}{path}": _expression(dimension, f"{prefix}{path}")
        for path, dimension in space.dimensions.items()
        if not isinstance(dimension, Constant)
    }


def _expression(dimension: Dimension, label: str) -> Any:
    from hyperopt import hp

    match dimension:
        case Uniform(low, high):
            return hp.uniform(label, low, high)
        case LogUniform(low, high):
            return hp.loguniform(label, math.log(low), math.log(high))
        case Normal(mean, deviation):
            return hp.normal(label, mean, deviation)
        case RandInt(low, high):
            return hp.uniform(label, low, high)
        case LogRandInt(low, high):
            return hp.loguniform(label, math.log(low), math.log(high))
        case QUniform():
            return hp.uniform(label, 0, len(dimension.values))
        case Choice(options) | Grid(options):
            return hp.choice(
                label, [{INDEX: i, **_to_hyperopt(option.space, f"{label}/{i}/")} for i, option in enumerate(options)]
            )


def _flat(drawn: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for label, value in drawn.items():
        if isinstance(value, Mapping):
            yield label, value[INDEX]
            yield from _flat(value)
        else:
            yield label, value


ENGINES = (EngineKind("bayesian", make_bayesian, several=False),)
