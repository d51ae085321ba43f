"""Trials that do not train by a config of their own: each makes a model of another one, and measures it.

Its outcome depends on nothing but its parameters, so no point is tried twice; what it has in common with other trials
is made once. It reports one row, as if it were one epoch.
"""

import random
from collections.abc import Callable, Mapping, Sequence
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
"""An engine that says so often in a row what cannot be tried now is not asked again: if all of it was tried already, a
point is drawn at random."""
DRAWS = 200
"""So many of those draws, and the space counts as tried out."""


Parts = Callable[[Mapping[str, Any]], Sequence[str]]
"""Names for what has to be made at a point. A trial waits for what another one is making."""


class Make(Protocol):
    """From parameters to figures. It is at work in `gate`, gives way in it now and then, and times its model alone."""

    def __call__(self, params: Mapping[str, Any], *, data: "Data", gate: Gate, warn: Warn) -> dict[str, float]: ...


@dataclass(frozen=True)
class Making:
    """The `make` of each trial's parameters, by one worker."""

    recipe: TrainConfig
    """How the model was trained that is made use of, which says what the data is."""
    make: Make
    parts: Parts
    code_references: tuple[str, ...] = ()
    """Of the user's code that only the making uses."""
    judged_each_epoch = True
    epochs = 1

    def engine(self, engine: Engine, space: Space, *, seed: int) -> Engine:
        return Distinct(engine, space, self.parts, seed=seed)

    def shortest(self) -> None:
        return None

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

    A point of which another trial is making a part is put off, until that trial has ended or there is no other point:
    two processes that share a beginning would do no more than one. When nothing is put off, and points drawn at random
    are all known too, it has nothing left to suggest.
    """

    def __init__(self, engine: Engine, space: Space, parts: Parts, *, seed: int) -> None:
        self._engine, self._space, self._parts, self._seed = engine, space, parts, seed
        self._trial_of: dict[str, str] = {}
        """The trial that has a point, by the point's canonical form."""
        self._asked_as: dict[str, str] = {}
        """The name under which the engine within knows a trial."""
        self._put_off: list[tuple[str, dict[str, Any]]] = []
        """Points, each under the name by which the engine within knows it."""
        self._running: dict[str, frozenset[str]] = {}
        """The parts of the trials that have not ended."""
        self._made: set[str] = set()
        self._costs: dict[str, Costs | None] = {}

    def suggest(self, trial: str) -> dict[str, Any] | None:
        for index, (name, point) in enumerate(self._put_off):
            if not self._would_wait(point):
                del self._put_off[index]
                return self._noted(trial, name, point)
        exhausted = False
        for attempt in range(REPEATS):
            name = f"{trial}/{attempt}"
            suggested = self._engine.suggest(name)
            if exhausted := suggested is None:
                break
            twin = self._trial_of.get(canonical_json(suggested))
            if twin is not None:
                self._engine.observe(name, self._costs.get(twin))
            elif not self._would_wait(suggested):
                return self._noted(trial, name, suggested)
            else:
                self._trial_of[canonical_json(suggested)] = name
                self._put_off.append((name, suggested))
        if self._put_off:
            return self._noted(trial, *self._put_off.pop(0))
        return None if exhausted else self._drawn(trial)

    def _drawn(self, trial: str) -> dict[str, Any] | None:
        rng = random.Random(f"{self._seed}/{trial}")
        for _ in range(DRAWS):
            point = self._space.sample(rng)
            if canonical_json(point) not in self._trial_of:
                self.adopt(trial, point)
                return point
        return None

    def adopt(self, trial: str, point: Mapping[str, Any]) -> None:
        self._engine.adopt(trial, point)
        self._noted(trial, trial, dict(point))

    def observe(self, trial: str, costs: Costs | None) -> None:
        self._costs[trial] = costs
        self._made |= self._running.pop(trial)
        self._engine.observe(self._asked_as[trial], costs)

    def _would_wait(self, point: Mapping[str, Any]) -> bool:
        missing = set(self._parts(point)) - self._made
        return any(missing & parts for parts in self._running.values())

    def _noted(self, trial: str, name: str, point: dict[str, Any]) -> dict[str, Any]:
        self._trial_of[canonical_json(point)] = trial
        self._asked_as[trial] = name
        self._running[trial] = frozenset(self._parts(point))
        return point
