"""The engines that say which parameters to try next: a file for each library, found by name.

A file of this folder declares its engines in `ENGINES` and imports its library only to make one, so that a plan can
look at every declaration. Nothing else names them: a new file is all that a new engine takes.

An engine is told the costs of every suggestion, in the order in which the trials ended. It must be a deterministic
function of its seed and of that sequence: a search resumes by leading a fresh engine through the journal.
"""

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Protocol

from heliostat.core.objective import Costs
from heliostat.core.space import Space


class Engine(Protocol):
    """What says which parameters to try next."""

    def suggest(self, trial: str) -> dict[str, Any] | None:
        """Parameters for a new trial; None when there is nothing left to try."""

    def adopt(self, trial: str, point: Mapping[str, Any]) -> None:
        """The trial has these parameters, which somebody else chose: as if they had been suggested."""

    def observe(self, trial: str, costs: Costs | None) -> None:
        """What came of the trial; None for a failed trial."""


class MakeEngine(Protocol):
    def __call__(self, space: Space, *, num_objectives: int, seed: int, trials: int) -> Engine: ...


@dataclass(frozen=True)
class EngineKind:
    """An engine as a pipeline file names it: `algorithm: NAME`."""

    name: str
    make: MakeEngine
    exhaustive: bool = False
    """It tries each point of a discrete space once: the space says how many trials there are."""
    learns: bool = True
    """What came of trials has a say in what it suggests next."""
    several: bool = True
    """It can take several objectives."""


@cache
def engines() -> Mapping[str, EngineKind]:
    """Every engine by its name."""
    modules = [import_module(f"{__name__}.{file.name}") for file in pkgutil.iter_modules(__path__)]
    return {kind.name: kind for module in modules for kind in module.ENGINES}


def startup_trials(trials: int) -> int:
    """How many trials an engine that models the objective draws at random first, as Optuna does by default."""
    return min(10, max(4, trials // 3))
