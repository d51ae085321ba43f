"""The engines that say which parameters to try next, one small adapter each.

An engine is told every suggestion's outcome, in the order in which the outcomes came. It must be a deterministic
function of its seed and of that sequence: a search resumes by leading a fresh engine through the journal.
"""

import random
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Protocol

import numpy as np
from hyperopt import hp
from ray.tune.search.hyperopt import HyperOptSearch

from heliostat.core.space import Choice, Constant, Dimension, Grid, LogUniform, RandInt, Space, Uniform

Algorithm = Literal["grid", "random", "bayesian"]
Mode = Literal["max", "min"]


class Engine(Protocol):
    def suggest(self, trial: str) -> dict[str, Any] | None:
        """Parameters for a new trial; None when there is nothing left to try."""

    def observe(self, trial: str, value: float | None) -> None:
        """The trial's objective; None for a failed trial."""


def make_engine(algorithm: Algorithm, *, space: Space, mode: Mode, seed: int, trials: int) -> Engine:
    """The engine for `algorithm`. A space of constants only leaves TPE nothing to model, so it is sampled."""
    match algorithm:
        case "grid":
            return _Listed(iter(space.grid()))
        case "random":
            return _Listed(_samples(space, seed))
        case "bayesian":
            return (
                _HyperOpt(space, mode=mode, seed=seed, trials=trials)
                if _to_hyperopt(space, "")
                else _Listed(_samples(space, seed))
            )


def _samples(space: Space, seed: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(seed)
    while True:
        yield space.sample(rng)


class _Listed:
    """Points that no outcome has a say in."""

    def __init__(self, points: Iterator[dict[str, Any]]) -> None:
        self._points = points

    def suggest(self, trial: str) -> dict[str, Any] | None:
        return next(self._points, None)

    def observe(self, trial: str, value: float | None) -> None:
        pass


class _HyperOpt:
    """Tree-structured Parzen estimators (Bergstra et al., 2011) by Ray's HyperOptSearch.

    An option of a choice goes through HyperOpt as its index, so that lists, dicts and None come back as written.
    """

    def __init__(self, space: Space, *, mode: Mode, seed: int, trials: int) -> None:
        self._space = space
        self._search = HyperOptSearch(
            _to_hyperopt(space, ""),
            metric="value",
            mode=mode,
            n_initial_points=min(20, max(4, trials // 3)),
            random_state_seed=seed,
        )

    def suggest(self, trial: str) -> dict[str, Any] | None:
        return _from_hyperopt(self._space, self._search.suggest(trial))

    def observe(self, trial: str, value: float | None) -> None:
        self._search.on_trial_complete(trial, result=None if value is None else {"value": value}, error=value is None)


def _to_hyperopt(space: Space, prefix: str) -> dict[str, Any]:
    """The space as HyperOpt's expressions. Labels carry the way through the options: they must be unique."""
    return {
        path: _expression(dim, f"{prefix}{path}")
        for path, dim in space.dimensions.items()
        if not isinstance(dim, Constant)
    }


def _expression(dimension: Dimension, label: str) -> Any:
    match dimension:
        case Uniform(low, high):
            return hp.uniform(label, low, high)
        case LogUniform(low, high):
            return hp.loguniform(label, np.log(low), np.log(high))
        case RandInt(low, high):
            return hp.uniformint(label, low, high - 1) if high - low > 1 else hp.choice(label, [low])
        case Choice(options) | Grid(options):
            return hp.choice(
                label, [{"index": i, **_to_hyperopt(o.space, f"{label}/{i}/")} for i, o in enumerate(options)]
            )


def _from_hyperopt(space: Space, drawn: Mapping[str, Any]) -> dict[str, Any]:
    point: dict[str, Any] = {}
    for path, dimension in space.dimensions.items():
        match dimension:
            case Constant(value):
                point[path] = value
            case RandInt():
                point[path] = int(drawn[path])
            case Uniform(low, high) | LogUniform(low, high):
                point[path] = min(max(float(drawn[path]), low), high)
            case Choice(options) | Grid(options):
                option = options[drawn[path]["index"]]
                point |= {path: option.value, **_from_hyperopt(option.space, drawn[path])}
    return point
