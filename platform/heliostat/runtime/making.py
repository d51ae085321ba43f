"""Trials that do not train by a config of their own: each makes a model of another one, and measures it.

Its outcome depends on nothing but its parameters, so no point is tried twice. It reports one row, as if it were one
epoch.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from heliostat.core.identity import canonical_json
from heliostat.core.objective import Costs
from heliostat.core.space import Space
from heliostat.runtime.engines import Engine
from heliostat.runtime.gate import Gate, gate_of_this_node
from heliostat.runtime.work import Conditions, OnEpoch, Trial, Warn, one_process
from heliostat.training.config import TrainConfig

if TYPE_CHECKING:
    from heliostat.training.task import Data

REPEATS = 20
"""An engine that says so often in a row what was tried already has no more to say, and a point is drawn at random."""
DRAWS = 200
"""So many of those draws, and the space counts as tried out."""


class Make(Protocol):
    """From parameters to figures. It is at work in `gate`, gives way in it now and then, and times its model alone."""

    def __call__(self, params: Mapping[str, Any], *, data: "Data", gate: Gate, warn: Warn) -> dict[str, float]: ...


@dataclass(frozen=True)
class Making:
    """The `make` of each trial's parameters, by one worker."""

    recipe: TrainConfig
    """How the model was trained that is made use of, which says what the data is."""
    make: Make
    code_references: tuple[str, ...] = ()
    """Of the user's code that only the making uses."""
    each_once = True
    judged_each_epoch = True
    epochs = 1

    def data_args(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        return self.recipe.data_args

    def do(self, trial: Trial, conditions: Conditions, *, on_epoch: OnEpoch, warn: Warn) -> None:
        with one_process(trial, conditions, *self.recipe.code_references, *self.code_references):
            data = conditions.data(self.recipe.data_args)
            with gate_of_this_node() as gate, gate.at_work():
                figures = self.make(trial.params, data=data, gate=gate, warn=warn)
            on_epoch(1, figures)


class Distinct:
    """An engine that suggests no point twice. Where the one within would, it is told the outcome that is known.

    It has nothing left to suggest when points drawn at random are all known too.
    """

    def __init__(self, engine: Engine, space: Space, *, seed: int) -> None:
        self._engine, self._space, self._seed = engine, space, seed
        self._trial_of: dict[str, str] = {}
        """The trial that has a point, by the point's canonical form."""
        self._asked_as: dict[str, str] = {}
        """The name under which the engine within knows a trial."""
        self._costs: dict[str, Costs | None] = {}

    def suggest(self, trial: str) -> dict[str, Any] | None:
        for attempt in range(REPEATS):
            name = f"{trial}/{attempt}"
            point = self._engine.suggest(name)
            if point is None:
                return None
            twin = self._trial_of.get(canonical_json(point))
            if twin is None:
                self._note(trial, name, point)
                return point
            self._engine.observe(name, self._costs.get(twin))
        rng = random.Random(f"{self._seed}/{trial}")
        for _ in range(DRAWS):
            point = self._space.sample(rng)
            if canonical_json(point) not in self._trial_of:
                self.adopt(trial, point)
                return point
        return None

    def adopt(self, trial: str, point: Mapping[str, Any]) -> None:
        self._engine.adopt(trial, point)
        self._note(trial, trial, point)

    def observe(self, trial: str, costs: Costs | None) -> None:
        self._costs[trial] = costs
        self._engine.observe(self._asked_as[trial], costs)

    def _note(self, trial: str, name: str, point: Mapping[str, Any]) -> None:
        self._trial_of[canonical_json(point)] = trial
        self._asked_as[trial] = name
