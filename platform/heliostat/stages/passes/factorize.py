"""The pass of `factorize`."""

from heliostat.compression import factorize as low_rank
from heliostat.core.stage import StageResult
from heliostat.stages.factorize import FactorizeConfig
from heliostat.stages.finetuning import mend
from heliostat.stages.models import torch_model
from heliostat.stages.passes.workshop import Source, Workshop


def factorize_model(shop: Workshop, source: Source, config: FactorizeConfig) -> StageResult:
    """Factorize the model, fine-tune it, and keep the ranks as a history that can be replayed."""
    energy = config.energy if config.rank is None else None
    model, steps, kept = low_rank.factorize(torch_model(source), rank=config.rank, energy=energy, skip=config.skip)
    details = {"factorized": {"ranks": steps[0]["ranks"], "kept": kept}}
    return mend(shop, model, config, source=source, steps=steps, details=details)
