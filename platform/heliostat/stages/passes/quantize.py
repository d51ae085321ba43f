"""The pass of `quantize`: by way of a file in float that a backend quantizes, or in torch by torchao."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from heliostat.compression.formats import load_model
from heliostat.compression.parity import check_parity, values_of_module
from heliostat.compression.quantize.aware import attach, detach, without_rounding
from heliostat.compression.quantize.eager import quantize_linear
from heliostat.compression.verdict import has_int8_instructions
from heliostat.core.stage import StageResult
from heliostat.stages.models import describe, torch_model
from heliostat.stages.passes.mixing import inspect, within_max_drop
from heliostat.stages.passes.quantizers import TOOLS, Job
from heliostat.stages.passes.teaching import taught_by
from heliostat.stages.passes.workshop import PARITY_SAMPLES, Source, Workshop
from heliostat.stages.quantize import BACKENDS, QuantizeConfig
from heliostat.training.loop import Fit

CALIBRATION_BATCH_SIZE = 64


def quantize_model(shop: Workshop, source: Source, config: QuantizeConfig) -> StageResult:
    """Quantize the model and compare the outcome with it."""
    if config.keeps_torch_model:
        return _in_torch(shop, source, config)
    tool = TOOLS[config.backend]
    details: dict[str, Any] = {}
    metrics: dict[str, float] = {}
    with TemporaryDirectory() as scratch:
        exact = source.folder
        if config.method == "qat":
            model, tuned, found = _aware(shop, source, config)
            details |= {"history": tuned.history, "best_epoch": tuned.epoch, **tuned.notes, **found}
            metrics, exact = tuned.metrics, Path(scratch, "aware")
            tool.export(model, exact, example=shop.samples("val", PARITY_SAMPLES), batch_size=shop.batch_size)
        elif describe(source.folder)["format"] != BACKENDS[config.backend].takes:
            exact = Path(scratch, "float")
            rows = shop.samples("val", PARITY_SAMPLES)
            tool.export(torch_model(source), exact, example=rows, batch_size=shop.batch_size)

        if config.method in tool.uncalibrated:
            files = tool.uncalibrated[config.method](Job(exact, shop.folder, shop, config, config.skip))
        else:
            files, found = _calibrated(shop, exact, config)
            details |= found
    if errors := inspect(shop.folder, shop):
        details["rounding_errors"] = [asdict(error) for error in errors]
    details |= {
        "quantization": describe(shop.folder)["quantization"],
        "parity": {"source": shop.parity(load_model(source.folder), against=source.node)},
    }
    return StageResult(files=[*files, *shop.save_loss()], metrics=metrics, details=details)


def _calibrated(shop: Workshop, exact: Path, config: QuantizeConfig) -> tuple[list[str], dict[str, Any]]:
    """Static int8; the files, and what was found out about the layers where some may stay in float."""
    rows = shop.samples(config.calibration_split, config.calibration_samples)
    calibration = _equal_batches(rows, at_once=shop.batch_size)
    tool = TOOLS[config.backend]
    if not config.max_drop:
        return tool.static(Job(exact, shop.folder, shop, config, config.skip, calibration)), {}
    found = within_max_drop(shop, exact, config, calibration)
    return found.attempt.quantize(exact, shop.folder, shop, calibration), dict(found.details)


def _equal_batches(rows: Tensor, *, at_once: int) -> Sequence[Tensor]:
    """All rows but for a few at the end: ONNX Runtime's histograms take batches of one size.

    Which rows these are does not depend on how many are computed `at_once`.
    """
    size = len(rows) // -(-len(rows) // CALIBRATION_BATCH_SIZE)
    kept = rows[: len(rows) // size * size]
    return torch.split(kept, max(part for part in range(1, min(size, at_once) + 1) if len(kept) % part == 0))


def _aware(shop: Workshop, source: Source, config: QuantizeConfig) -> tuple[nn.Module, Fit, dict[str, Any]]:
    """The source trained on with rounding, and how that went: the fit, and what the record says besides."""
    model = torch_model(source)
    exact = attach(model, per_channel=config.per_channel, reduce_range=config.weights_of_7_bits)
    tuning = config.changed(shop.recipe, epochs=config.finetune_epochs, scheduler=config.scheduler)
    teachers = [shop.teacher or source]
    with taught_by(shop, teachers, config.distillation, student=model, option="distillation.loss") as lesson:
        tuned = shop.fine_tune(model, tuning, batch_loss=lesson.loss, data=lesson.data)
    exactly = without_rounding(model).eval()
    detach(model)
    check_parity(
        model.eval(),
        exactly,
        shop.samples("val", PARITY_SAMPLES),
        what="the model that was trained, its rounding left out,",
        values=partial(values_of_module, exactly),
        batch_size=shop.batch_size,
    )
    return model, tuned, {"not_rounded": exact, **lesson.details}


def _in_torch(shop: Workshop, source: Source, config: QuantizeConfig) -> StageResult:
    assert config.method in ("dynamic", "weight_only")
    described, model = describe(source.folder), torch_model(source)
    small, steps = quantize_linear(model, scheme=config.method, skip=config.skip)
    layers = steps[-1]["layers"]
    quantization = {
        "backend": "torchao",
        "method": config.method,
        "bits": 8,
        "int8_ops": {"Linear": len(layers)},
        "float_ops": {},
        "int8_instructions": has_int8_instructions(),
    }
    files = shop.save(
        small,
        history=[*described["history"], *steps],
        reference=described["reference"],
        macs=described["macs"],
        quantization=quantization,
    )
    compared = {
        "reload": shop.reload_parity(small),
        "source": shop.parity(model, against=source.node),
    }
    return StageResult(files=files, details={"quantization": quantization, "parity": compared})
