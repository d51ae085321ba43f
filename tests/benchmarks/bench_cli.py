"""How long the command line takes to answer: `--help`, and `plan` beyond what importing the user's own module takes.

Prints one JSON line: the median seconds of RUNS runs of each, and all values. Targets: help_s < 0.4,
plan_extra_s < 0.8.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = 5
PIPELINES = Path(__file__).parents[2] / "pipelines"


def seconds(command: list[str], *, cwd: Path) -> float:
    start = time.perf_counter()
    subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    heliostat = [sys.executable, "-m", "heliostat.cli"]
    with tempfile.TemporaryDirectory() as store:
        commands = {
            "help": [*heliostat, "--help"],
            "plan": [*heliostat, "plan", "mnist.yaml", "--set", f"storage={store}"],
            "user_module": [sys.executable, "-c", "import mnist"],
        }
        values: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(RUNS):  # in turns, so that a slow minute of the machine hits all alike
            for name, command in commands.items():
                values[name].append(seconds(command, cwd=PIPELINES))
    medians = {name: statistics.median(times) for name, times in values.items()}
    figures = {
        "benchmark": "cli",
        "help_s": round(medians["help"], 3),
        "plan_s": round(medians["plan"], 3),
        "user_module_s": round(medians["user_module"], 3),
        "plan_extra_s": round(medians["plan"] - medians["user_module"], 3),
        "values_s": {name: [round(t, 3) for t in times] for name, times in values.items()},
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
