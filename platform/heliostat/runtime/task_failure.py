"""Failures of the task itself: they end a search once, where failures of parameters end one trial.

A missing package, unreadable data, samples that do not batch or a metric that raises fail at every point of the space.
When a trial fails before it reports a figure, and no trial has ended yet, it tries other points of the space with one
step of training each. If all fail alike, the search ends with that reason. A search whose first trials work pays
nothing.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from heliostat.core.disk import disk_error
from heliostat.core.probes import probes
from heliostat.core.space import Space
from heliostat.errors import HeliostatError
from heliostat.runtime.failures import kind_of_failure
from heliostat.runtime.tasks import own_traceback
from heliostat.runtime.work import Conditions, OnEpoch, Trial, Work

AT_MOST = 12
"""The number of other points to try: if one point in three works, all of them miss it once in 130 searches."""
LENGTH = ("epochs", "steps_per_epoch")
"""What a point says of how long to train is left out."""


class _WorkedError(Exception):
    """Unwinds a training that came to the figures of an epoch."""


def other_points(space: Space, *, seed: int) -> tuple[Mapping[str, Any], ...]:
    """Points from all over the space, in a random order."""
    rng = random.Random(seed)
    found = list(probes(space, rng))
    return tuple(rng.sample(found, min(AT_MOST, len(found))))


def fails_everywhere(
    work: Work,
    conditions: Conditions,
    trial: Trial,
    reason: str,
    *,
    check: Callable[[Mapping[str, float]], object],
    is_over: Callable[[], bool],
) -> bool:
    """Whether the work fails at other points as it did in the trial, for that `reason`.

    `check` raises for a row in which a trial would fail. The process may die of a point that is tried; the reason is
    then in the trial's note.
    """
    short, note = work.shortest(), conditions.failure_note(trial.id)
    if short is None or note.exists():
        return False
    with suppress(OSError):  # a full disk may be the reason
        note.write_text(reason, encoding="utf-8")

    def on_epoch(epoch: int, row: Mapping[str, float]) -> bool:
        check(row)
        raise _WorkedError

    try:
        return all(
            not is_over() and _fails_alike(short, conditions, trial, point, reason, on_epoch)
            for point in conditions.other_points
        )
    finally:
        note.unlink(missing_ok=True)


def _fails_alike(
    short: Work, conditions: Conditions, trial: Trial, point: Mapping[str, Any], reason: str, on_epoch: OnEpoch
) -> bool:
    params = {path: value for path, value in point.items() if path not in LENGTH}
    try:
        short.do(Trial(trial.id, params, trial.seed), conditions, on_epoch=on_epoch, warn=_unheard)
    except _WorkedError:
        return False
    except Exception as error:
        return kind_of_failure(why_it_failed(error, conditions)) == kind_of_failure(reason)
    return False


def why_it_failed(error: Exception, conditions: Conditions) -> str:
    """The reason of a trial that raised this: a sentence of ours, or the traceback of the user's code."""
    known = disk_error(error, conditions.folder) or error
    return str(known) if isinstance(known, HeliostatError) else own_traceback(error)


def why_it_failed_before(note: Path) -> str | None:
    """What a trial failed of whose process died while it tried other points."""
    return note.read_text(encoding="utf-8") if note.exists() else None


def told_of_task(reason: str, *, trial: str, points: Sequence[Any]) -> str:
    """What a search ends with."""
    others = f"trial {trial} and {len(points)} other points of the space" if points else f"trial {trial}"
    return f"the task fails whatever the parameters are; {others} failed alike, so no other trial is run: {reason}"


def _unheard(text: str) -> None: ...
