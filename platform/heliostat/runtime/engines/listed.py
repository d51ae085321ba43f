"""`grid` and `random`: points that no outcome has a say in, from Python's own library."""

import random
from collections.abc import Iterator, Mapping
from typing import Any

from heliostat.core.identity import canonical_json
from heliostat.core.objective import Costs
from heliostat.core.space import Space
from heliostat.runtime.engines import Engine, EngineKind


class Listed:
    """One point after another but for those that were adopted, until there are no more."""

    def __init__(self, points: Iterator[dict[str, Any]]) -> None:
        self._points = points
        self._adopted: set[str] = set()

    def suggest(self, trial: str) -> dict[str, Any] | None:
        return next((point for point in self._points if canonical_json(point) not in self._adopted), None)

    def adopt(self, trial: str, point: Mapping[str, Any]) -> None:
        self._adopted.add(canonical_json(point))

    def observe(self, trial: str, costs: Costs | None) -> None:
        pass


def make_grid(space: Space, *, num_objectives: int, seed: int, trials: int) -> Engine:
    return Listed(iter(space.grid()))


def make_random(space: Space, *, num_objectives: int, seed: int, trials: int) -> Engine:
    return Listed(_samples(space, random.Random(seed)))


def _samples(space: Space, rng: random.Random) -> Iterator[dict[str, Any]]:
    while True:
        yield space.sample(rng)


ENGINES = (
    EngineKind("grid", make_grid, exhaustive=True, learns=False),
    EngineKind("random", make_random, learns=False),
)
