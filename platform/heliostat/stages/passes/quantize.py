"""The pass of `quantize`: by way of a file in float that a backend quantizes, or in torch by torchao."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from heliostat.compression.formats import load_model
from heliostat.compression.quantize.aware import attach, detach
from heliostat.compression.quantize.eager import quantize_linear
from heliostat.compression.quantize.sensitivity import Drops, Mix, mix_precision
from heliostat.compression.verdict import has_int8_instructions
from heliostat.core.stage import StageResult
from heliostat.stages.models import describe, torch_model
from heliostat.stages.passes.quantizers import TOOLS, Job
from heliostat.stages.passes.teaching import taught_by
from heliostat.stages.passes.workshop import PARITY_SAMPLES, Source, Workshop, files_in, write_files
from heliostat.stages.quantize import BACKENDS, QuantizeConfig
from heliostat.training.evaluation import evaluate
from heliostat.training.loop import Fit
from heliostat.training.task import build_objective

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
            tool.export(model, exact, example=shop.samples("val", PARITY_SAMPLES))
        elif describe(source.folder)["format"] != BACKENDS[config.backend].takes:
            exact = Path(scratch, "float")
            tool.export(torch_model(source), exact, example=shop.samples("val", PARITY_SAMPLES))

        if config.method in tool.uncalibrated:
            files = tool.uncalibrated[config.method](Job(exact, shop.folder, shop, config, config.skip))
        else:
            files, found = _calibrated(shop, exact, config)
            details |= found
    details |= {
        "quantization": describe(shop.folder)["quantization"],
        "parity": {"source": shop.parity(load_model(source.folder), against=source.node)},
    }
    return StageResult(files=files, metrics=metrics, details=details)


def _calibrated(shop: Workshop, exact: Path, config: QuantizeConfig) -> tuple[list[str], dict[str, Any]]:
    """Static int8; the files, and what was found out about the layers where some may stay in float."""
    calibration = _equal_batches(shop.samples(config.calibration_split, config.calibration_samples))
    tool = TOOLS[config.backend]
    if not config.max_drop:
        return tool.static(Job(exact, shop.folder, shop, config, config.skip, calibration)), {}
    mix = _mix(shop, exact, config, calibration)
    found: dict[str, Any] = {"mixed_precision": {"left_in_float": list(mix.left_in_float), "drops": mix.drops}}
    if mix.alone:
        found["sensitivity"] = [
            {"layer": layer, **{f"{metric}_drop": drop for metric, drop in drops.items()}}
            for layer, drops in mix.alone.items()
        ]
    skip = [*config.skip, *mix.left_in_float]
    return tool.static(Job(exact, shop.folder, shop, config, skip, calibration)), found


def _equal_batches(rows: Tensor) -> Sequence[Tensor]:
    """All rows but for a few at the end: ONNX Runtime's histograms take batches of one size."""
    size = len(rows) // -(-len(rows) // CALIBRATION_BATCH_SIZE)
    return [batch for batch in torch.split(rows, size) if len(batch) == size]


@dataclass(frozen=True)
class _Given:
    """What every mix of int8 and float is made of."""

    shop: Workshop
    files: Mapping[str, bytes]
    """Of the artifact in float."""
    calibration: Sequence[Tensor]
    config: QuantizeConfig


def _mix(shop: Workshop, exact: Path, config: QuantizeConfig, calibration: Sequence[Tensor]) -> Mix:
    """Which layers have to stay in float for validation to drop by no more than `max_drop`."""
    objective = build_objective(shop.task)
    before = evaluate(load_model(exact), shop.data["val"], objective, split="val")
    given = _Given(shop.portable, files_in(exact), calibration, config)

    def drops_with(mixes: Sequence[Sequence[str]]) -> list[Drops]:
        signs = {metric: 1 if objective.mode(metric) == "max" else -1 for metric in config.max_drop}
        return [
            {metric: sign * (before[metric] - after[metric]) for metric, sign in signs.items()}
            for after in shop.side_by_side(_mixed_figures, given, mixes)
        ]

    every = TOOLS[config.backend].layers_of(exact)
    layers = [name for name in every if not any(fnmatchcase(name, pattern) for pattern in config.skip)]
    return mix_precision(layers, drops_with, max_drop=config.max_drop)


def _mixed_figures(given: _Given, left_in_float: Sequence[str]) -> dict[str, float]:
    """The figures of `val` with these layers in float and all others in int8."""
    with TemporaryDirectory(prefix="heliostat-") as scratch:
        exact, mixed = Path(scratch, "float"), Path(scratch, "mixed")
        write_files(given.files, exact)
        skip = [*given.config.skip, *left_in_float]
        job = Job(exact, mixed, given.shop, given.config, skip, given.calibration)
        TOOLS[given.config.backend].static(job)
        objective = build_objective(given.shop.task)
        return evaluate(load_model(mixed), given.shop.data["val"], objective, split="val")


def _aware(shop: Workshop, source: Source, config: QuantizeConfig) -> tuple[nn.Module, Fit, dict[str, Any]]:
    """The source trained on with rounding, and how that went: the fit, and what the record says besides."""
    model = torch_model(source)
    exact = attach(model, per_channel=config.per_channel, reduce_range=config.weights_of_7_bits)
    tuning = config.changed(shop.recipe, epochs=config.finetune_epochs, scheduler=config.scheduler)
    teachers = [shop.teacher or source]
    with taught_by(shop, teachers, config.distillation, student=model, option="distillation.loss") as lesson:
        tuned = shop.fine_tune(model, tuning, batch_loss=lesson.loss, data=lesson.data)
    detach(model)
    return model.eval(), tuned, {"not_rounded": exact, **lesson.details}


def _in_torch(shop: Workshop, source: Source, config: QuantizeConfig) -> StageResult:
    assert config.method in ("dynamic", "weight_only")
    described, model = describe(source.folder), torch_model(source)
    small, steps = quantize_linear(model, scheme=config.method, skip=config.skip)
    layers = steps[0]["layers"]
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
