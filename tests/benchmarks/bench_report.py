"""What `context.report` after every step costs a worker of a user's own `train_fn`, through the whole of a run.

A pipeline with one `train` stage runs on 1 and on 2 workers. Its `train_fn` times ROUNDS blocks of STEPS steps of its
own work without a report and with one after each, in turns; the difference is what a report costs. A history of all
rows is kept, so the last round tells whether the cost grows. Prints one JSON line: medians and all rounds, ms a step.
Target: at most 10 ms.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROUNDS, STEPS, WORKERS = 5, 400, (1, 2)
TASK = """
import json
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

def build_model():
    return nn.Linear(64, 10)

def build_data():
    rows = TensorDataset(torch.randn(64, 64), torch.arange(64) % 10)
    return {{"train": rows, "val": rows, "test": rows}}

def train_fn(context, config):
    data = build_data()["train"]
    model, _ = context.prepare(build_model(), torch.utils.data.DataLoader(data, batch_size=64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    inputs, targets = data.tensors

    def step():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        return loss.item()

    def ms(work):
        started = time.perf_counter()
        for _ in range({steps}):
            work()
        return 1000 * (time.perf_counter() - started) / {steps}

    ms(step)
    rounds = [[ms(step), ms(lambda: context.report({{"val_loss": step()}}))] for _ in range({rounds})]
    context.report({{"val_loss": 0.0}}, checkpoint=getattr(model, "module", model).state_dict())
    if context.rank == 0:
        Path({result!r}).write_text(json.dumps(rounds))
"""


FUNCTIONS = {"model": "build_model", "data": "build_data", "train_fn": "train_fn"}


def measure(workers: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = folder / "rounds.json"
        (folder / "reports.py").write_text(TASK.format(steps=STEPS, rounds=ROUNDS, result=str(result)))
        pipeline = {
            "name": "reports",
            "task": {name: f"reports:{function}" for name, function in FUNCTIONS.items()},
            "stages": [{"name": "train", "uses": "train", "resources": {"workers": workers}}],
        }
        (folder / "reports.yaml").write_text(json.dumps(pipeline))
        command = [sys.executable, "-m", "heliostat.cli", "run", str(folder / "reports.yaml")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rounds = json.loads(result.read_text())
    costs = [reporting - alone for alone, reporting in rounds]
    return {
        "report_ms": round(statistics.median(costs), 3),
        "last_round_ms": round(costs[-1], 3),
        "rounds_ms": [[round(figure, 3) for figure in pair] for pair in rounds],
    }


def main() -> None:
    figures = {f"workers_{count}": measure(count) for count in WORKERS}
    print(json.dumps({"benchmark": "report", "steps": STEPS, **figures}))


if __name__ == "__main__":
    main()
