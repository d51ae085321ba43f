"""`select`: the best of the candidates within limits, by validation; test figures are only reported beside them."""

import shutil
from collections.abc import Iterator

from heliostat.core.capacity import NOTHING
from heliostat.core.stage import ConfigView, StageContext, StageResult, stage
from heliostat.stages.choosing import Demands, candidates_table, check_demands

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


class SelectConfig(Demands):
    """Which of the models is the best. The baseline takes part, so that it stays if no candidate is better."""


def _check(config: SelectConfig, view: ConfigView) -> Iterator[str]:
    yield from check_demands(config, view, costs=COSTS)


@stage(
    "select",
    inputs={"baseline": "model", "candidates": "model*"},
    output="model",
    place="driver",
    needs=lambda resources: NOTHING,
    check=_check,
    keeps_metrics=True,
    measured="together",
    works_apart=lambda resources: True,  # in the driver, which has what it compares
)
def select(context: StageContext, config: SelectConfig) -> StageResult:
    """Choose. The artifact is a copy of the chosen model; the record has a verdict on every candidate."""
    from heliostat.compression.pareto import choose

    baseline = context.one("baseline")
    everyone = {baseline.node: baseline, **{artifact.node: artifact for artifact in context.inputs["candidates"]}}
    metrics = {name: artifact.metrics for name, artifact in everyone.items()}
    modes = context.task.metric_modes
    choice = choose(
        (baseline.node, baseline.metrics),
        metrics,
        max_drop=config.max_drop,
        minimize=config.minimize,
        at_most=config.at_most,
        directions=modes,
    )
    chosen = everyone[choice.chosen]
    for name in chosen.record.files:
        target = context.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(chosen.folder / name, target)
    return StageResult(
        files=list(chosen.record.files),
        metrics=chosen.metrics,
        params=chosen.record.params,
        details={
            "chosen": choice.chosen,
            "baseline": baseline.node,
            "table": candidates_table(baseline.metrics, metrics, choice, modes=modes),
        },
    )
