"""`optuna_tpe`: tree-structured Parzen estimators by Optuna, with its defaults (Watanabe, 2023,
https://arxiv.org/abs/2304.11127), and of several objectives (Ozaki et al., 2022, https://doi.org/10.1613/jair.1.13188).

By default it also keeps away from what runs at the moment (`constant_liar`). Limits are constraints to it.
Optuna asks for a dimension's distribution when the point comes to it, so a conditional one is asked for only where it
exists. An option goes through Optuna as its index, a normally distributed number as its quantile.
"""

from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

from heliostat.core.objective import Costs
from heliostat.core.points import numbers_at
from heliostat.core.space import (
    Choice,
    Grid,
    LogRandInt,
    LogUniform,
    Normal,
    QUniform,
    RandInt,
    Space,
    Uniform,
    Varied,
)
from heliostat.runtime.engines import Engine, EngineKind, startup_trials

TAIL = 1e-9
"""So much of a normal distribution is left out at either end."""


def make_tpe(space: Space, *, num_objectives: int, seed: int, trials: int) -> Engine:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(n_startup_trials=startup_trials(trials), seed=seed)
    study = optuna.create_study(sampler=sampler, directions=["minimize"] * num_objectives)
    return _Optuna(space, study)


class _Optuna:
    def __init__(self, space: Space, study: Any) -> None:
        self._space, self._study = space, study
        self._asked: dict[str, Any] = {}

    def suggest(self, trial: str) -> dict[str, Any] | None:
        asked = self._asked[trial] = self._study.ask()
        return self._space.point(lambda label, dimension: _draw(asked, label, dimension))

    def adopt(self, trial: str, point: Mapping[str, Any]) -> None:
        numbers = {
            label: _quantile(dimension, number) if isinstance(dimension, Normal) else number
            for label, (dimension, number) in numbers_at(self._space, point).items()
        }
        self._study.enqueue_trial(numbers)
        self.suggest(trial)

    def observe(self, trial: str, costs: Costs | None) -> None:
        from optuna.trial import TrialState

        asked = self._asked.pop(trial)
        if costs is None:
            self._study.tell(asked, state=TrialState.FAIL)
        else:
            for index, excess in enumerate(costs.excess):
                asked.set_constraint(f"limit {index}", excess)
            self._study.tell(asked, costs.objectives)


def _quantile(dimension: Normal, number: float) -> float:
    """Optuna takes what lies in a tail for its end."""
    return min(max(NormalDist(dimension.mean, dimension.deviation).cdf(number), TAIL), 1 - TAIL)


def _draw(asked: Any, label: str, dimension: Varied) -> Any:
    match dimension:
        case Uniform(low, high):
            return asked.suggest_float(label, low, high)
        case LogUniform(low, high):
            return asked.suggest_float(label, low, high, log=True)
        case Normal(mean, deviation):
            return NormalDist(mean, deviation).inv_cdf(asked.suggest_float(label, TAIL, 1 - TAIL))
        case RandInt(low, high):
            return asked.suggest_int(label, low, high - 1)
        case LogRandInt(low, high):
            return asked.suggest_int(label, low, high - 1, log=True)
        case QUniform():
            return asked.suggest_int(label, 0, len(dimension.values) - 1)
        case Choice(options) | Grid(options):
            return asked.suggest_categorical(label, range(len(options)))


ENGINES = (EngineKind("optuna_tpe", make_tpe),)
