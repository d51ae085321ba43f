"""What a search learns from the trials of an earlier one before its first suggestion.

That is the search at a path, `start_from: [{trials: PATH}]`, or a stage of the same file in the slot `start_from`. Its
trials teach the engine and have no other part: none of them runs again, counts as a trial of the new search or can be
the best of it.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heliostat.core.objective import Objectives
from heliostat.core.points import numbers_at
from heliostat.core.space import Space
from heliostat.errors import SpecError, nearest

if TYPE_CHECKING:
    from heliostat.runtime.journal import TrialRecord

JOURNAL, TABLE = "journal.jsonl", "trials.json"
SLOT = "start_from"


@dataclass(frozen=True)
class Lessons:
    """The trials of an earlier search that another one learns from, with its own figures of them."""

    trials: tuple["TrialRecord", ...]
    left_out: Mapping[str, int]
    """How many of the others had failed, lie outside the space, and so on."""
    first_problem: str = ""
    """Of those that do not fit."""

    def __str__(self) -> str:
        others = "".join(f", {number} {why}" for why, number in self.left_out.items())
        return f"{len(self.trials)} of {len(self.trials) + sum(self.left_out.values())}{others}"


def lessons_of(stated: str, *, root: Path, space: Space, objectives: Objectives) -> Lessons:
    """What the ended trials of the search at `stated` teach: its folder, journal or table, from `root`.

    Raises SpecError where there is no such search, or nothing to learn from it.
    """
    file = find_file(stated, root)
    try:
        lessons = lessons_in(file, space=space, objectives=objectives)
    except (ValueError, KeyError, TypeError, RecursionError) as error:  # the last is JSON that nests without end
        raise SpecError(f"{stated!r}: {file.name} is not what a search writes: {error!r}") from error
    if not lessons.trials:
        sums = ", ".join(f"{number} {why}" for why, number in lessons.left_out.items()) or "no trial of it has ended"
        first = f"; {lessons.first_problem}" if lessons.first_problem else ""
        raise SpecError(f"{stated!r}: nothing to learn from it: {sums}{first}")
    return lessons


def lessons_in(file: Path, *, space: Space, objectives: Objectives) -> Lessons:
    """What the ended trials in a journal or a table teach, which may be nothing."""
    useful, left_out, first = [], Counter[str](), ""
    for trial in _ended_trials(file, objectives):
        if problem := _why_useless(trial, space, objectives):
            why, what = problem
            left_out[why] += 1
            first = first or what
        else:
            useful.append(trial)
    return Lessons(tuple(useful), left_out, first)


def digest_of(stated: str, *, root: Path) -> str:
    """The first 16 hexadecimal digits of the sha256 of what the file holds."""
    return hashlib.sha256(find_file(stated, root).read_bytes()).hexdigest()[:16]


def find_file(stated: str, root: Path) -> Path:
    """The journal or the table of the search at `stated`. Raises SpecError where there is none."""
    path = (root / Path(stated).expanduser()).resolve()
    if path.is_file():
        return path
    if not path.is_dir():
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise SpecError(f"{stated!r}: no such file or folder{nearest(path.name, beside)}")
    files = [path / name for name in (JOURNAL, TABLE)]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        below = [file.parent.name for file in path.glob(f"*/{JOURNAL}")]
        raise SpecError(f"{stated!r}: no folder of a search: no {JOURNAL} is in it{nearest(path.name, below)}")
    return found


def _ended_trials(file: Path, objectives: Objectives) -> Iterator["TrialRecord"]:
    from heliostat.runtime.journal import Standing, TrialRecord, read_events

    if file.suffix == ".jsonl":
        standing = Standing()
        for event in read_events(file):
            standing.apply(event, objectives)
        yield from standing.ended.values()
    else:
        for row in json.loads(file.read_text(encoding="utf-8")):
            history = [(row["epochs"], row["metrics"])]
            figures = objectives.figures([row["metrics"]])
            yield TrialRecord(
                row["id"], row["params"], row["status"], figures, row["epochs"], row["reason"], row["seconds"], history
            )


def _why_useless(trial: "TrialRecord", space: Space, objectives: Objectives) -> tuple[str, str] | None:
    """A word for what is wrong with it, and what is; None when the engine can learn from it."""
    if trial.status == "failed":
        return "failed", ""
    try:
        numbers_at(space, trial.params)
    except SpecError as error:
        return "outside the space", f"trial {trial.id}: {error}"
    if not trial.metrics:
        reported: dict[str, Any] = {metric: value for _, row in trial.history for metric, value in row.items()}
        missing = next((metric for metric in objectives.metrics if metric not in reported), objectives.first.metric)
        return f"without {missing}", f"trial {trial.id}: no epoch has {missing!r}{nearest(missing, reported)}"
    return None
