"""The pass of `factorize`."""

from typing import Any

from heliostat.compression import factorize as low_rank
from heliostat.compression.parametrizations import bake, baked_weights
from heliostat.core.stage import StageResult
from heliostat.stages.factorize import FactorizeConfig
from heliostat.stages.finetuning import mend
from heliostat.stages.models import torch_model
from heliostat.stages.passes.workshop import Source, Workshop


def factorize_model(shop: Workshop, source: Source, config: FactorizeConfig) -> StageResult:
    """Factorize the model, fine-tune it, and keep the ranks as a history that can be replayed."""
    energy = config.energy if config.rank is None else None
    model = torch_model(source)
    baked = bake(model, shop.proof)
    model, steps, kept = low_rank.factorize(
        model, rank=config.rank, energy=energy, skip=config.skip, example=shop.proof
    )
    found: dict[str, Any] = {"ranks": steps[0]["ranks"], "kept": kept}
    if baked:
        found["baked"] = baked_weights(baked[0])
    return mend(shop, model, config, source=source, steps=[*baked, *steps], details={"factorized": found})
