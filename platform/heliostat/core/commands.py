"""The commands that messages suggest: each with the flags that were given, so that it does what it says when pasted.

The command line notes once what was typed (`note_given`); every message that suggests a command gets it here.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from heliostat.core.credentials import redacted

SUBMITTED_AS = "HELIOSTAT_SUBMITTED_AS"
"""In the environment of a job: the command that submitted it, which is what its user can type again."""


@dataclass(frozen=True)
class Given:
    """What was typed: the pipeline file as it was written, and the flags."""

    file: Path | None = None
    settings: Sequence[str] = ()
    address: str | None = None
    force: Sequence[str] = ()


_given = Given()


def note_given(
    file: Path, settings: Sequence[str] | None, *, address: str | None = None, force: Sequence[str] | None = None
) -> None:
    """Note what was typed: suggestions from here on repeat it."""
    global _given
    _given = Given(file, settings or (), address, force or ())


def run_again(*more: str, force: bool = False) -> str:
    """`heliostat run` with the file and the flags that were given, and `more`.

    `--force` is left out unless `force`: the forced stages have finished by then, or resume from where they were
    interrupted, and a second `--force` would discard that work. A job is submitted again.
    """
    submitted_as = os.environ.get(SUBMITTED_AS)
    if submitted_as and not more:
        return submitted_as
    if _given.file is None:  # in Python, or in a process of the cluster
        return " ".join(["heliostat run FILE", *more]) if more else "the same call of heliostat.run"
    forced = [word for stage in _given.force for word in ("--force", stage)] if force else []
    address = ["--address", _given.address] if _given.address else []
    return command("run", *_file_and_settings(_given), *address, *forced, *more)


def submit_again(given: Given) -> str:
    """`heliostat submit` as it was typed."""
    return command("submit", *_file_and_settings(given), *(["--address", given.address] if given.address else []))


def with_store(name: str, storage: Path) -> str:
    """A command that reads the store in `storage`, such as `heliostat ui --storage .heliostat`."""
    return command(name, "--storage", _as_typed(storage))


def command(*words: str) -> str:
    """`heliostat WORDS`, quoted for a shell. Passwords are left out; who pastes it types them again."""
    return shlex.join([_program(), *map(redacted, words)])


def _file_and_settings(given: Given) -> list[str]:
    return [str(given.file), *(word for setting in given.settings for word in ("--set", setting))]


def _as_typed(path: Path) -> str:
    """The path from the working directory, where it lies below that."""
    return str(path.relative_to(Path.cwd()) if path.is_absolute() and path.is_relative_to(Path.cwd()) else path)


def _program() -> str:
    """How this command was reached: by name, or by its path in a virtual environment that is not active."""
    script = Path(sys.argv[0])
    if os.environ.get("VIRTUAL_ENV") == sys.prefix or script.name != "heliostat" or not script.is_absolute():
        return "heliostat"
    return _as_typed(script)
