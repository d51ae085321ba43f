"""`quantize`: small integers through ONNX Runtime or torchao, after training or learned in it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from heliostat.core.artifact import Artifact
from heliostat.core.model import Count, Flag, NonNegative, NonNegativeInt
from heliostat.core.stage import ConfigView, StageContext, StageResult, stage
from heliostat.stages.checks import check_metric, check_trainable
from heliostat.stages.finetuning import FineTuning, check_tuning, taught_by
from heliostat.training.config import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from heliostat.compression.quantize.sensitivity import Drops, Mix
    from heliostat.training.loop import Fit

CALIBRATION_BATCH_SIZE = 64

CALIBRATED = frozenset({"calibration", "calibration_samples", "calibration_split", "per_channel", "reduce_range"})
OPTIONS: dict[str, frozenset[str]] = {
    "static": CALIBRATED | {"max_drop"},
    "dynamic": CALIBRATED | {"backend"},  # how to calibrate is for `static`, in a matrix over both
    "qat": CALIBRATED | {"max_drop"} | FineTuning.model_fields.keys(),
    "weight_only": frozenset({"backend", "bits", "group_size"}),
}
"""What each method takes beside `skip`."""


class QuantizeConfig(FineTuning):
    """`static` measures the range of every activation on `calibration_samples` beforehand.

    `dynamic` measures it while running, for matrix products and LSTMs only: convolutions would get slower. `qat` first
    trains the model on with the rounding of int8, then does as `static`. `weight_only` stores the weights of matrix
    products in few bits and computes in float: for transformers.
    """

    method: Literal["static", "dynamic", "qat", "weight_only"] = "static"
    backend: Literal["onnxruntime", "torchao"] = "onnxruntime"
    """What runs the outcome. torchao keeps a torch model, with int8 weights in its linear layers."""
    calibration: Literal["minmax", "entropy", "percentile"] = "minmax"
    calibration_samples: Count = 256
    calibration_split: Literal["train", "val"] = "train"
    per_channel: Flag = True
    reduce_range: Flag = True
    """7-bit weights: exact where int8 products saturate (AVX2 without VNNI); `false` where they do not."""
    max_drop: dict[str, NonNegative] = Field(default_factory=dict)
    """Layers stay in float, the most sensitive first, until the metrics of `val` drop by no more than this."""
    bits: Literal[4, 8] = 8
    group_size: Literal[16, 32, 64, 128, 256] = 32
    """So many weights in a row share a scale."""
    skip: tuple[str, ...] = ()
    """Patterns of names of layers that stay in float: of the ONNX graph, such as `/head/*`, or torch's for torchao."""
    finetune_epochs: NonNegativeInt = 3
    """Of `qat`."""

    @model_validator(mode="after")
    def _options_fit(self) -> "QuantizeConfig":
        for option in sorted(self.model_fields_set & frozenset().union(*OPTIONS.values())):
            if option not in OPTIONS[self.method]:
                takes = ", ".join(sorted(OPTIONS[self.method]))
                raise ValueError(f"{self.method} takes no {option!r}; it takes {takes}")
        if self.backend == "torchao" and self.bits != 8:
            raise ValueError(f"torchao stores {self.bits} bits in 8 on a CPU; take the backend 'onnxruntime'")
        if self.method == "qat" and not self.finetune_epochs:
            raise ValueError("qat learns in training; give it finetune_epochs, or take static")
        return self


def _check(config: QuantizeConfig, view: ConfigView) -> Iterator[str]:
    for kind, _ in view.inputs["model"]:
        if kind.name == "quantize":
            yield "inputs.model: it is quantized already; name the stage before it"
        elif config.method == "qat":
            yield from check_trainable(view, slot="model")
            yield from check_tuning(config, view)
        elif config.backend == "torchao":
            yield from check_trainable(view, slot="model")
    for metric in config.max_drop:
        yield from check_metric(metric, view, place=f"config.max_drop.{metric}", splits=("val",))


def _workload(config: QuantizeConfig) -> dict[str, int]:
    return {"epochs": config.finetune_epochs} if config.method == "qat" else {}


@stage(
    "quantize",
    inputs={"model": "model"},
    output="model",
    version=2,
    measured="later",
    workload=_workload,
    check=_check,
)
def quantize(context: StageContext, config: QuantizeConfig) -> StageResult:
    """Quantize the model in the slot `model` and compare the outcome with it."""
    from heliostat.compression.export import save_onnx
    from heliostat.compression.formats import load_model
    from heliostat.compression.quantize.post_training import dynamic, static, weight_only
    from heliostat.stages.models import describe, parity, samples, torch_model, train_config_of

    if config.backend == "torchao":
        return _in_torch(context, config)
    source = context.one("model")
    recipe = train_config_of(source)
    details: dict[str, Any] = {}
    tuned: Fit | None = None
    with TemporaryDirectory() as scratch:
        onnx = source.folder
        if config.method == "qat":
            model, tuned, exact = _aware(context, config, source, recipe)
            details |= {"history": tuned.history, "best_epoch": tuned.epoch, "not_rounded": exact}
            onnx = Path(scratch, "aware")
            save_onnx(model, onnx, example=samples(context.task, recipe, split="val", count=2))
        elif describe(source.folder)["format"] != "onnx":
            onnx = Path(scratch, "float")
            save_onnx(torch_model(source), onnx, example=samples(context.task, recipe, split="val", count=2))

        if config.method == "dynamic":
            files = dynamic(onnx, context.folder, reduce_range=config.reduce_range, skip=config.skip)
        elif config.method == "weight_only":
            files = weight_only(onnx, context.folder, bits=config.bits, group_size=config.group_size, skip=config.skip)
        else:
            calibration = samples(
                context.task, recipe, split=config.calibration_split, count=config.calibration_samples
            )

            def run_static(target: Path, left_in_float: Sequence[str]) -> list[str]:
                return static(
                    onnx,
                    target,
                    calibration=_equal_batches(calibration),
                    per_channel=config.per_channel,
                    method=config.calibration,
                    reduce_range=config.reduce_range,
                    skip=[*config.skip, *left_in_float],
                )

            mix = _mix(context, config, recipe, onnx, run_static) if config.max_drop else None
            files = run_static(context.folder, mix.left_in_float if mix else ())
            if mix:
                details["sensitivity"] = {
                    "left_in_float": list(mix.left_in_float),
                    "drops": mix.drops,
                    "alone_in_int8": mix.alone,
                }
    details |= {
        "quantization": describe(context.folder)["quantization"],
        "parity": {"source": parity(context, recipe, load_model(source.folder), against=source.node)},
    }
    return StageResult(
        files=files, metrics=tuned.metrics if tuned else {}, params=source.record.params, details=details
    )


def _equal_batches(rows: "Tensor") -> "Sequence[Tensor]":
    """All rows but for a few at the end: ONNX Runtime's histograms take batches of one size."""
    import torch

    size = len(rows) // -(-len(rows) // CALIBRATION_BATCH_SIZE)
    return [batch for batch in torch.split(rows, size) if len(batch) == size]


def _in_torch(context: StageContext, config: QuantizeConfig) -> StageResult:
    from heliostat.compression.quantize.eager import quantize_linear
    from heliostat.compression.verdict import has_int8_instructions
    from heliostat.stages.models import describe, parity, save_trained, torch_model, train_config_of

    assert config.method in ("dynamic", "weight_only")
    source = context.one("model")
    recipe, described, model = train_config_of(source), describe(source.folder), torch_model(source)
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
    files = save_trained(
        context,
        small,
        config=recipe,
        history=[*described["history"], *steps],
        reference=described["reference"],
        macs=described["macs"],
        quantization=quantization,
    )
    compared = {
        "reload": parity(context, recipe, small, against="the model before saving"),
        "source": parity(context, recipe, model, against=source.node),
    }
    details = {"quantization": quantization, "parity": compared}
    return StageResult(files=files, params=source.record.params, details=details)


def _aware(
    context: StageContext, config: QuantizeConfig, source: Artifact, recipe: TrainConfig
) -> "tuple[nn.Module, Fit, dict[str, str]]":
    """The source trained on with rounding, how that went, and the layers that were not rounded, with the reason."""
    from heliostat.compression.quantize.aware import attach, detach
    from heliostat.stages.models import fine_tune, torch_model
    from heliostat.training.task import build_data

    model = torch_model(source)
    exact = attach(model, per_channel=config.per_channel, reduce_range=config.reduce_range)
    tuning = config.changed(recipe, epochs=config.finetune_epochs, scheduler=config.scheduler)
    data = build_data(context.task, recipe.data_args)
    with taught_by([source], config.distillation, task=context.task, student=model, data=data) as (loss, taught):
        tuned = fine_tune(context, model, tuning, batch_loss=loss, data=taught)
    detach(model)
    return model.eval(), tuned, exact


def _mix(context: StageContext, config: QuantizeConfig, recipe: TrainConfig, onnx: Path, run_static: Any) -> "Mix":
    """Which layers have to stay in float for validation to drop by no more than `max_drop`."""
    from fnmatch import fnmatchcase

    from heliostat.compression.formats import load_model
    from heliostat.compression.quantize.post_training import layers_of
    from heliostat.compression.quantize.sensitivity import mix_precision
    from heliostat.training.evaluation import evaluate
    from heliostat.training.task import build_data, build_objective

    val, objective = build_data(context.task, recipe.data_args)["val"], build_objective(context.task)

    def quality(folder: Path) -> dict[str, float]:
        return evaluate(load_model(folder), val, objective, split="val")

    before = quality(onnx)

    def drops_with(left_in_float: Sequence[str]) -> "Drops":
        with TemporaryDirectory() as folder:
            run_static(Path(folder), left_in_float)
            after = quality(Path(folder))
        signs = {metric: 1 if objective.mode(metric) == "max" else -1 for metric in config.max_drop}
        return {metric: sign * (before[metric] - after[metric]) for metric, sign in signs.items()}

    layers = [name for name in layers_of(onnx) if not any(fnmatchcase(name, pattern) for pattern in config.skip)]
    return mix_precision(layers, drops_with, max_drop=config.max_drop)
