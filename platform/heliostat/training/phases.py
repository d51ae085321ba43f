"""Where the time of an epoch goes."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

TIMES = frozenset({"data_s", "train_s", "val_s", "checkpoint_s", "seconds"})
"""The figures of an epoch's row that are times."""


class Phases:
    """A stopwatch for each phase. On an accelerator a phase counts until its work is queued, not until it is done."""

    def __init__(self) -> None:
        self._seconds: Counter[str] = Counter()

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] += time.perf_counter() - started  # type: ignore[assignment]

    def waiting(self, phase: str, items: Iterable[T]) -> Iterator[T]:
        """The items; waiting for each counts for the phase."""
        iterator = iter(items)
        while True:
            with self.time(phase):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def row(self) -> dict[str, float]:
        """Seconds by phase as metrics, such as `data_s`."""
        return {f"{phase}_s": seconds for phase, seconds in self._seconds.items()}
