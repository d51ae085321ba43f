"""Heliostat: search, distributed training and compression in one pipeline, on Ray, reviewed in MLflow."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heliostat.compression.loading import load_model
    from heliostat.core.spec import MetricRef, Pipeline, Resources, Stage, Task, Tracking
    from heliostat.runner import load_pipeline, plan, run
    from heliostat.stages import (
        CompressConfig,
        DistillConfig,
        ExportConfig,
        FactorizeConfig,
        NasConfig,
        PruneConfig,
        QuantizeConfig,
        SelectConfig,
        TrainConfig,
        TuneConfig,
    )

_HOMES = {
    "heliostat.core.spec": ("MetricRef", "Pipeline", "Resources", "Stage", "Task", "Tracking"),
    "heliostat.runner": ("load_pipeline", "plan", "run"),
    "heliostat.compression.loading": ("load_model",),
    "heliostat.stages": (
        "CompressConfig",
        "DistillConfig",
        "ExportConfig",
        "FactorizeConfig",
        "NasConfig",
        "PruneConfig",
        "QuantizeConfig",
        "SelectConfig",
        "TrainConfig",
        "TuneConfig",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "CompressConfig",
    "DistillConfig",
    "ExportConfig",
    "FactorizeConfig",
    "MetricRef",
    "NasConfig",
    "Pipeline",
    "PruneConfig",
    "QuantizeConfig",
    "Resources",
    "SelectConfig",
    "Stage",
    "Task",
    "Tracking",
    "TrainConfig",
    "TuneConfig",
    "load_model",
    "load_pipeline",
    "plan",
    "run",
]


def __getattr__(name: str) -> Any:
    """The public names, each imported when it is first asked for: `import heliostat` costs nothing."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'heliostat' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)
