"""Failures of trials, told apart by what they have in common and counted."""

import re
from collections import Counter
from collections.abc import Iterable

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


def commonest(reasons: Iterable[str]) -> str:
    """The failures by kind, the commonest first, each as its first trial told it."""
    reasons = list(reasons)
    first: dict[tuple[str, str], str] = {}
    for reason in reasons:
        first.setdefault(kind_of_failure(reason), reason)
    counts = Counter(map(kind_of_failure, reasons)).most_common(SHOWN)
    return "\n\n".join(f"{count} of {len(reasons)}: {first[kind]}" for kind, count in counts)
