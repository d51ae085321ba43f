"""One function of many items, for code that does not care where it is carried out: here, or by whoever is handed in."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")


class Map(Protocol):
    """`[function(shared, item) for item in items]`, in whatever order and process: the function changes neither."""

    def __call__(self, function: Callable[[S, T], R], shared: S, items: Sequence[T]) -> list[R]: ...


def in_turn(function: Callable[[S, T], R], shared: S, items: Sequence[T]) -> list[R]:
    """One after another, in this process."""
    return [function(shared, item) for item in items]
