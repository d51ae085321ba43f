"""Measurements that may be taken in several sittings: a benchmark of an hour shares its machine with other work.

`--keep FILE` appends each result to FILE and takes none again that is in it; `--minutes M` ends the sitting before the
measurement that would start later than that.
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
    arguments = parser.parse_args()

    results: dict[str, Any] = {}
    if arguments.keep and arguments.keep.exists():
        results = dict(map(json.loads, arguments.keep.read_text().splitlines()))
    started = time.monotonic()
    for name, measure in pieces.items():
        if name in results:
            continue
        if time.monotonic() - started > 60 * arguments.minutes:
            taken = len(pieces.keys() & results.keys())
            sys.exit(f"{taken} of {len(pieces)} measurements are taken; go on with the same command")
        results[name] = measure()
        print(name, results[name], file=sys.stderr)
        if arguments.keep:
            with arguments.keep.open("a") as file:
                file.write(json.dumps([name, results[name]]) + "\n")
    return {name: results[name] for name in pieces}
