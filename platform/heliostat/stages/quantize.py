"""`quantize`: small integers through ONNX Runtime or torchao, after training or learned in it."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from pydantic import Field, model_validator

from heliostat.core.model import Count, Flag, NonNegative, NonNegativeInt
from heliostat.core.stage import ConfigView, StageContext, StageResult, stage
from heliostat.stages.checks import check_metric, check_trainable
from heliostat.stages.export import ExportConfig
from heliostat.stages.finetuning import FineTuning, check_tuning

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
    for kind, given in view.inputs["model"]:
        if kind.name == "quantize":
            yield "inputs.model: it is quantized already; name the stage before it"
        elif isinstance(given, ExportConfig) and given.format != "onnx":
            yield f"inputs.model: a model in the format {given.format!r} cannot be quantized; name the stage before it"
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
    from heliostat.stages.models import train_config_of, workshop_of
    from heliostat.stages.passes.quantize import quantize_model

    source = context.one("model")
    quantized = quantize_model(workshop_of(context, train_config_of(source)), source, config)
    return replace(quantized, params=source.record.params)
