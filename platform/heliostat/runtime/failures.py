"""Failures of trials, told apart by what they have in common and counted."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_FRAME = re.compile(r'^  File "(?P<file>.+)", line (?P<line>\d+), in ', re.MULTILINE)
_VARIES = re.compile(r"0x[0-9a-f]+|\b[0-9a-f]{16,}\b|\d+")
"""Addresses, ids and numbers: the same mistake has others in each trial."""
SHOWN = 3
"""So many kinds of failure are told in full."""


def kind_of_failure(reason: str) -> tuple[str, str]:
    """What the same mistake always has: the error's type and text without its numbers, and the line that raised it.

    `reason` is that text, and below it the frames of a traceback, if there are any.
    """
    frames = list(_FRAME.finditer(reason))
    text = reason[: frames[0].start()] if frames else reason
    return _VARIES.sub("#", text).strip(), f"{frames[-1]['file']}:{frames[-1]['line']}" if frames else ""


@dataclass(frozen=True)
class Failures:
    """Trials that failed in the same way."""

    count: int
    first: str
    """The trial that was the first to."""
    reason: str
    """As that one told it: a line, and below it the frames of a traceback, if there are any."""

    @property
    def line(self) -> str:
        """The reason in one line, with the place of the code that raised it."""
        text, _, _ = self.reason.strip().partition("\n")
        frames = [(Path(frame["file"]), frame["line"]) for frame in _FRAME.finditer(self.reason)]
        own = [(file, line) for file, line in frames if "site-packages" not in file.parts] or frames
        return f"{text} ({own[-1][0].name}:{own[-1][1]})" if own else text


def grouped(reasons: Mapping[str, str]) -> list[Failures]:
    """The failures by kind, the commonest first, given each failed trial's reason."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for trial, reason in reasons.items():
        kinds.setdefault(kind_of_failure(reason), []).append(trial)
    groups = [Failures(len(trials), trials[0], reasons[trials[0]]) for trials in kinds.values()]
    return sorted(groups, key=lambda group: -group.count)


def told(failures: Sequence[Failures], *, of: int) -> str:
    """`5 of 10 trials failed: 4 like 0002: ValueError: no (toy.py:12); 0007: its process was killed or crashed`."""
    parts = [f"{'' if f.count == 1 else f'{f.count} like '}{f.first}: {f.line}" for f in failures[:SHOWN]]
    parts += [f"{len(failures) - SHOWN} more kinds of failure"] if len(failures) > SHOWN else []
    return f"{sum(f.count for f in failures)} of {of} trials failed: {'; '.join(parts)}"


def commonest(reasons: Iterable[str]) -> str:
    """The failures by kind, the commonest first, each as its first trial told it."""
    reasons = list(reasons)
    first: dict[tuple[str, str], str] = {}
    for reason in reasons:
        first.setdefault(kind_of_failure(reason), reason)
    counts = Counter(map(kind_of_failure, reasons)).most_common(SHOWN)
    return "\n\n".join(f"{count} of {len(reasons)}: {first[kind]}" for kind, count in counts)
