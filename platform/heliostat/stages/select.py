"""`select`: the best of the candidates within limits, by validation; test figures are only reported beside them."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from heliostat.core.artifact import Artifact
from heliostat.core.capacity import NOTHING
from heliostat.core.model import NonNegative, Spec
from heliostat.core.stage import ConfigView, StageContext, StageResult, stage
from heliostat.errors import nearest
from heliostat.stages.checks import check_metric

COSTS = (
    "latency_ms",
    "latency_ms_p95",
    "latency_ms_p99",
    "latency_ms_b32",
    "latency_ms_b32_p95",
    "size_mb",
    "size_zip_mb",
    "num_params",
    "num_nonzero",
    "num_macs",
)
"""What a choice may minimise: every model is measured for these."""
DIGITS = 6


class SelectConfig(Spec):
    """`max_drop`: how much worse than the baseline a candidate may be, in the metric's own unit."""

    max_drop: dict[str, NonNegative] = Field(default_factory=dict)
    minimize: tuple[str, ...] = Field(default=("latency_ms", "size_mb"), min_length=1)


def _check(config: SelectConfig, view: ConfigView) -> Iterator[str]:
    for metric in config.max_drop:
        yield from check_metric(metric, view, place=f"config.max_drop.{metric}", splits=("val",))
    for index, cost in enumerate(config.minimize):
        if cost not in COSTS:
            yield f"config.minimize[{index}]: no model is measured for {cost!r}{nearest(cost, COSTS)}"


@stage(
    "select",
    inputs={"baseline": "model", "candidates": "model*"},
    output="model",
    place="driver",
    needs=lambda resources: NOTHING,
    check=_check,
    keeps_metrics=True,
    measured="together",
)
def select(context: StageContext, config: SelectConfig) -> StageResult:
    """Choose. The artifact is a copy of the chosen model; the record has a verdict on every candidate."""
    from heliostat.compression.pareto import choose

    baseline = context.one("baseline")
    candidates = {artifact.node: artifact for artifact in context.inputs["candidates"]}
    choice = choose(
        (baseline.node, baseline.metrics),
        {name: artifact.metrics for name, artifact in candidates.items()},
        max_drop=config.max_drop,
        minimize=config.minimize,
        directions=context.task.metric_modes,
    )
    everyone = {baseline.node: baseline, **candidates}
    chosen = everyone[choice.chosen]
    for name in chosen.record.files:
        target = context.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(chosen.folder / name, target)
    verdicts = {verdict.name: verdict for verdict in choice.verdicts}
    return StageResult(
        files=list(chosen.record.files),
        metrics=chosen.metrics,
        params=chosen.record.params,
        details={
            "chosen": choice.chosen,
            "baseline": baseline.node,
            "table": _table(baseline, [everyone[name] for name in verdicts], verdicts, modes=context.task.metric_modes),
        },
    )


def _table(
    baseline: Artifact,
    artifacts: Sequence[Artifact],
    verdicts: Mapping[str, Any],
    *,
    modes: Mapping[str, Literal["max", "min"]],
) -> list[dict[str, Any]]:
    """One row a model: its figures, how they compare with the baseline's, and why it was or was not chosen."""
    from heliostat.compression.bootstrap import told_apart

    base = baseline.metrics
    sampled = [metric for metric in modes if f"{metric}_low" in base]
    return [
        {
            "model": artifact.node,
            "chosen": verdicts[artifact.node].chosen,
            "why": verdicts[artifact.node].reason,
            "on_front": verdicts[artifact.node].on_front,
            "speed_up": round(base["latency_ms"] / artifact.metrics["latency_ms"], DIGITS),
            "size_ratio": round(artifact.metrics["size_mb"] / base["size_mb"], DIGITS),
            "quality": {
                metric: told_apart(artifact.metrics, base, metric, mode=modes[metric])
                for metric in sampled
                if f"{metric}_low" in artifact.metrics
            },
            "metrics": dict(artifact.metrics),
        }
        for artifact in artifacts
    ]
