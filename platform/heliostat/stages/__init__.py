"""The built-in stages: for each a config model and one function. Importing this registers them, and is cheap."""

from heliostat.stages.compress import CompressConfig
from heliostat.stages.distill import DistillConfig
from heliostat.stages.export import ExportConfig
from heliostat.stages.factorize import FactorizeConfig
from heliostat.stages.nas import NasConfig
from heliostat.stages.prune import PruneConfig
from heliostat.stages.quantize import QuantizeConfig
from heliostat.stages.select import SelectConfig
from heliostat.stages.train import TrainConfig
from heliostat.stages.tune import TuneConfig

__all__ = [
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
]
