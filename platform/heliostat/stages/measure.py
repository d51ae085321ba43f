"""What every model artifact is measured for, whichever stage made it. The runner calls both as Ray tasks.

Quality is computed beside other work; speed with every CPU of a node held, since a busy neighbour falsifies it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from heliostat.core.spec import Task
from heliostat.training.config import TrainConfig

SECONDS_PER_BATCH_SIZE = 0.15
"""Every CPU of a node waits while speed is measured; so many seconds give thousands of runs of a small network."""


def recipe_of(params: Mapping[str, Any]) -> TrainConfig:
    """How the model was trained, as the record's params carry it from stage to stage; an own stage may not say."""
    return TrainConfig.model_validate(params.get("train", {}))


def measure_quality(folder: Path, task: Task, recipe: TrainConfig) -> dict[str, float]:
    """Loss and metrics on `val`, which choices use, and on `test`, which is only reported; size and parameters."""
    from heliostat.compression.formats import load_model
    from heliostat.compression.measure import num_params, size_mb
    from heliostat.training.evaluation import evaluate
    from heliostat.training.task import build_data, build_objective

    model = load_model(folder)
    data, objective = build_data(task, recipe.data_args), build_objective(task)
    figures: dict[str, float] = {"size_mb": size_mb(folder), "num_params": num_params(folder)}
    for split in ("val", "test"):
        if split in data:
            figures |= evaluate(model, data[split], objective, split=split)
    return figures


def measure_speed(
    folder: Path, task: Task, recipe: TrainConfig, source: Path | None, method: str
) -> tuple[dict[str, float], dict[str, Any]]:
    """Latency (p50, p95) at batch 1 and 32 and throughput, one thread, on real samples.

    With a `source`, the model that this one came from, both are timed in turns, and the second result says how much
    faster it got, or why it did not. `method` is what was done to it.
    """
    from heliostat.compression.formats import load_model
    from heliostat.compression.measure import measure_speed as measure
    from heliostat.compression.measure import num_params
    from heliostat.compression.verdict import CAUSES, why_not_faster
    from heliostat.stages.models import describe, samples

    example = samples(task, recipe, split="val", count=32)
    baseline = load_model(source) if source else None
    figures = measure(load_model(folder), example=example, baseline=baseline, min_seconds=SECONDS_PER_BATCH_SIZE)
    if source is None:
        return figures, {}
    facts = describe(folder).get("quantization") or {"params_ratio": num_params(folder) / num_params(source)}
    verdict: dict[str, Any] = {}
    for suffix in ("", "_b32"):
        speedup = figures.pop(f"speedup{suffix}")
        verdict[f"speedup{suffix}"] = speedup
        if method in CAUSES:
            latency_ms = figures[f"latency_ms{suffix}"]
            why = why_not_faster(speedup, method=method, facts=facts, latency_ms=latency_ms)
            verdict[f"why_not_faster{suffix}"] = why
    return figures, {name: value for name, value in verdict.items() if value is not None}
