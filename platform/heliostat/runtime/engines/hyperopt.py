"""`bayesian`: tree-structured Parzen estimators (Bergstra et al., 2011) by HyperOpt.

HyperOpt itself and not Ray's HyperOptSearch, which takes no points once it has begun. A label is a dimension's way
through the options of the space. An option goes through HyperOpt as its index: it would make `{}` of lists and dicts.
Of a whole number it draws a real one, whose floor is taken: its own whole numbers have the ends half as often as the
rest. It knows no limits: what is beyond one counts as worse than anything within.
"""

import math
from collections.abc import Mapping
from functools import partial
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

GAMMA = 0.25
"""The best `GAMMA * sqrt(n)` of `n` trials are the good ones, HyperOpt's default."""


def make_bayesian(space: Space, *, num_objectives: int, seed: int, trials: int) -> Engine:
    """The engine. A space of constants alone leaves HyperOpt nothing to model, so it is sampled."""
    expressions = _to_hyperopt(space, "")
    if not expressions:
        return make_random(space, num_objectives=num_objectives, seed=seed, trials=trials)
    return _HyperOpt(space, expressions, seed=seed, startup=startup_trials(trials))


class _HyperOpt:
    def __init__(self, space: Space, expressions: Mapping[str, Any], *, seed: int, startup: int) -> None:
        from hyperopt import Trials, tpe
        from hyperopt.base import Domain
        from numpy.random import RandomState

        self._space, self._domain = space, Domain(lambda point: point, expressions)
        self._past, self._random = Trials(), RandomState(seed)
        self._draw = partial(tpe.suggest, n_startup_jobs=startup, gamma=GAMMA)
        self._open: dict[str, dict[str, Any]] = {}
        """HyperOpt's documents of the trials that have not ended."""

    def suggest(self, trial: str) -> dict[str, Any] | None:
        from hyperopt.base import spec_from_misc

        ids = self._past.new_trial_ids(1)
        self._past.refresh()
        (drawn,) = self._draw(ids, self._domain, self._past, self._random.randint(2**31 - 1))
        self._enter(trial, drawn)
        numbers = spec_from_misc(drawn["misc"])
        return self._space.point(lambda label, dimension: numbers[label])

    def adopt(self, trial: str, point: Mapping[str, Any]) -> None:
        from hyperopt.fmin import generate_trial

        (tid,) = self._past.new_trial_ids(1)
        numbers = numbers_at(self._space, point)
        adopted = generate_trial(tid, {label: _real(*numbers[label]) for label in numbers})
        for drawn in (adopted["misc"]["idxs"], adopted["misc"]["vals"]):
            drawn |= {label: [] for label in self._domain.params if label not in numbers}
        self._enter(trial, adopted)

    def _enter(self, trial: str, document: dict[str, Any]) -> None:
        self._past.insert_trial_docs([document])
        self._past.refresh()
        self._open[trial] = self._past.trials[-1]  # a copy of what was given

    def observe(self, trial: str, costs: Costs | None) -> None:
        from hyperopt import JOB_STATE_DONE, JOB_STATE_ERROR, STATUS_OK

        document = self._open.pop(trial)
        if costs is None:
            document["state"] = JOB_STATE_ERROR
        else:
            document["state"] = JOB_STATE_DONE
            document["result"] = {"status": STATUS_OK, "loss": costs.objectives[0] if costs.within else math.inf}
        self._past.refresh()


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
            return hp.choice(label, [_to_hyperopt(option.space, f"{label}/{i}/") for i, option in enumerate(options)])


ENGINES = (EngineKind("bayesian", make_bayesian, several=False),)
