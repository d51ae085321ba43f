"""What can go wrong, by whose fault it is. Each error knows the exit code that the command line ends with."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import ClassVar


class HeliostatError(Exception):
    """The base of every error that Heliostat raises on purpose; its text is meant for the user."""

    exit_code: ClassVar[int] = 1


class SpecError(HeliostatError):
    """The pipeline file, a flag or the user's code reference is wrong. The text names the place and the value."""

    exit_code = 2


class ResourceError(HeliostatError):
    """What is asked for can never fit the cluster."""

    exit_code = 3


class StageError(HeliostatError):
    """A stage ran and failed."""


class ArtifactError(HeliostatError):
    """An artifact is missing, damaged, or not of the kind that was asked for."""


class DiskError(HeliostatError):
    """A disk took no more: it is full, read-only, or its user has no right to more of it."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'sparsity'?"`, or the list of what is known when nothing is near, or nothing."""
    known = sorted(known)
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""
