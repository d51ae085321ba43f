"""What the stages `prune` and `quantize` cost beyond the bare functions: a small CNN on 5,000 MNIST digits.

In one run of a pipeline eight candidates are made two at a time, on a Ray whose workers have made two models before.
Then two processes make the same from the same models, with the functions that they are, called in a script: prune,
train on, quantize, save, and evaluate on validation and test. Their imports, and reading the data, are over before the
clock starts. Of the stages a candidate is also compared with its source, measured in more ways, recorded and tracked.

Prints one JSON line: `stages_s` and `bare_s` are the time that a candidate holds one of the two CPUs (twice the wall
time of all eight, by eight), `overhead_s` is their difference. Target: overhead_s < 2.
"""

import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from heliostat import load_pipeline, run
from heliostat.core.outcome import Unwatched

PROCESSES = 2
USER_CODE = [Path(__file__).parents[2] / "pipelines" / "mnist.py", Path(__file__).parent / "tasks" / "cnn.py"]
SPARSITIES, METHODS = [0.25, 0.5], ["static", "dynamic"]
EPOCH: dict[str, Any] = {"finetune_epochs": 1}


def stage(name: str, uses: str, source: str, matrix: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": name, "uses": uses, "inputs": {"model": source}, "matrix": matrix, "config": config}


PIPELINE: dict[str, Any] = {
    "name": "cnn",
    "task": {"model": "cnn:build_model", "data": "cnn:build_data", "metrics": ["cnn:accuracy"]},
    "stages": [
        {"name": "train", "uses": "train", "config": {"epochs": 1, "model_args": {"width": 8}}},
        stage("first", "prune", "train", {"sparsity": [0.1, 0.2]}, EPOCH),
        stage("pruned", "prune", "first", {"sparsity": SPARSITIES}, EPOCH),
        stage("int8", "quantize", "first", {"method": METHODS}, {}),
    ],
}
CANDIDATES = PROCESSES * (len(SPARSITIES) + len(METHODS))


class Clock(Unwatched):
    """Notes when the first candidate starts and when the last one is made."""

    first_s = last_s = 0.0

    def started(self, node: Any) -> None:
        if node.stage in ("pruned", "int8"):
            self.first_s = self.first_s or time.perf_counter()

    def made(self, node: Any, metrics: Mapping[str, float]) -> None:
        if node.stage in ("pruned", "int8"):
            self.last_s = time.perf_counter()


def make_bare(source: str, barrier: Any) -> None:
    """Two pruned models and two quantized ones from the model in a folder, saved and evaluated."""
    import torch
    from cnn import build_data
    from torch import nn

    from heliostat.compression.export import save_onnx
    from heliostat.compression.formats import load_model, load_torch, save_torch
    from heliostat.compression.prune.structured import structured
    from heliostat.compression.quantize.post_training import dynamic, static
    from heliostat.core.spec import Task
    from heliostat.training.config import TrainConfig
    from heliostat.training.evaluation import evaluate
    from heliostat.training.loop import fit
    from heliostat.training.task import build_objective

    torch.set_num_threads(1)
    data, objective = build_data(), build_objective(Task(**PIPELINE["task"]))
    example = torch.stack([data["val"][row][0] for row in range(2)])
    calibration = [torch.stack([data["train"][row][0] for row in range(at, at + 64)]) for at in range(0, 256, 64)]

    def judge(folder: Path) -> None:
        model = load_model(folder)
        for split in ("val", "test"):
            evaluate(model, data[split], objective, split=split)

    def export(model: nn.Module, folder: Path) -> Path:
        save_onnx(model, folder, example=example)
        return folder

    model = load_torch(Path(source))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        barrier.wait()
        for sparsity in SPARSITIES:
            small, _ = structured(model, example=example, sparsity=sparsity, scope="layer")
            fitted = fit(small, data, TrainConfig(epochs=1), objective=objective, seed=0)
            small.load_state_dict(fitted.state)
            target = folder / str(sparsity)
            save_torch(small.eval(), target, reference="cnn:build_model", model_args={"width": 8}, example=example)
            evaluate(small, data["val"], objective, split="val")
            evaluate(small, data["test"], objective, split="test")
        static(export(model, folder / "float"), folder / "static", calibration=calibration, per_channel=True)
        judge(folder / "static")
        dynamic(export(model, folder / "again"), folder / "dynamic")
        judge(folder / "dynamic")
        barrier.wait()


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in USER_CODE:
            shutil.copy(file, folder)
        (folder / "pipeline.yaml").write_text(json.dumps(PIPELINE))
        clock = Clock()
        result = run(load_pipeline(folder / "pipeline.yaml"), view=clock)
        assert result.status == "done", [node.error for node in result.nodes]

        sys.path.insert(0, str(folder))
        spawn = multiprocessing.get_context("spawn")
        barrier = spawn.Barrier(PROCESSES + 1)
        sources = [str(node.path) for node in result.nodes if node.stage == "first"]
        workers = [spawn.Process(target=make_bare, args=(source, barrier)) for source in sources]
        for worker in workers:
            worker.start()
        barrier.wait()
        start = time.perf_counter()
        barrier.wait()
        bare_s = (time.perf_counter() - start) * PROCESSES / CANDIDATES
        for worker in workers:
            worker.join()
    stages_s = (clock.last_s - clock.first_s) * PROCESSES / CANDIDATES
    figures = {"stages_s": round(stages_s, 2), "bare_s": round(bare_s, 2), "overhead_s": round(stages_s - bare_s, 2)}
    print(json.dumps({"benchmark": "compression_overhead", **figures, "candidates": CANDIDATES}))


if __name__ == "__main__":
    main()
