"""Measurements that may be taken in several sittings: a benchmark of an hour shares its machine with other work.

`--keep FILE` appends each result to FILE and takes none again that is in it; `--minutes M` ends the sitting before the
measurement that would start later than that. `--only NAME ...` takes those alone, so that several sittings with the
same FILE can go on side by side, each on CPUs of its own (`taskset -c 0,1 ...`); the last to end has all results.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def take(pieces: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """The result of each piece, a JSON value, taken in the order given. Exits when the sitting ends before the last."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--only", nargs="+", choices=list(pieces), default=list(pieces), metavar="NAME")
    arguments = parser.parse_args()

    results = _kept(arguments.keep)
    started = time.monotonic()
    for name in arguments.only:
        if name in results or time.monotonic() - started > 60 * arguments.minutes:
            continue
        results[name] = pieces[name]()
        print(name, results[name], file=sys.stderr)
        if arguments.keep:
            with arguments.keep.open("a") as file:
                file.write(json.dumps([name, results[name]]) + "\n")
    results |= _kept(arguments.keep)
    taken = len(pieces.keys() & results.keys())
    if taken < len(pieces):
        sys.exit(f"{taken} of {len(pieces)} measurements are taken; go on with the same command")
    return {name: results[name] for name in pieces}


def _kept(file: Path | None) -> dict[str, Any]:
    """What earlier sittings, and those beside this one, have taken."""
    if file is None or not file.exists():
        return {}
    return dict(map(json.loads, file.read_text().splitlines()))
