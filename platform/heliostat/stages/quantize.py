"""`quantize`: small integers for ONNX Runtime, torch, ExecuTorch or LiteRT, after training or learned in it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field, model_validator

from heliostat.core.artifact import Record
from heliostat.core.extras import missing
from heliostat.core.model import Count, Flag, NonNegative, NonNegativeInt
from heliostat.core.stage import ConfigView, StageContext, StageResult, stage
from heliostat.stages.checks import check_metric, check_trainable
from heliostat.stages.export import ExportConfig
from heliostat.stages.finetuning import FineTuning, check_tuning, params_of_tuning

CALIBRATED = frozenset({"calibration", "calibration_samples", "calibration_split", "per_channel"})
PER_CHANNEL = CALIBRATED - {"per_channel"}
"""Where there is always one scale per output channel."""
LEARNED = frozenset(FineTuning.model_fields)
MIXED = frozenset({"max_drop"})


@dataclass(frozen=True)
class Backend:
    """What runs a quantized model, and what it can."""

    options: Mapping[str, frozenset[str]]
    """What each of its methods takes beside `skip`. How to calibrate is nothing to `dynamic`, but in a matrix over
    methods it is for `static`."""
    takes: str
    """The format that it starts from: a model exported to it is quantized as it is."""
    needs: str | None = None
    """The package that an extra brings."""
    calibrations: tuple[str, ...] = ("minmax",)
    bits: tuple[int, ...] = (8,)
    """Of `weight_only`."""


def _with_calibration(more: frozenset[str] = frozenset()) -> dict[str, frozenset[str]]:
    calibrated = CALIBRATED | more
    return {"static": calibrated | MIXED, "dynamic": calibrated, "qat": calibrated | MIXED | LEARNED}


BACKENDS: dict[str, Backend] = {
    "onnxruntime": Backend(
        _with_calibration(frozenset({"reduce_range"})) | {"weight_only": frozenset({"bits", "group_size"})},
        takes="onnx",
        calibrations=("minmax", "entropy", "percentile"),
        bits=(4, 8),
    ),
    "torchao": Backend(
        _with_calibration(frozenset({"reduce_range"})) | {"weight_only": frozenset({"bits"})}, takes="pt2"
    ),
    "executorch": Backend(_with_calibration() | {"dynamic": PER_CHANNEL}, takes="pt2", needs="executorch"),
    "litert": Backend(
        _with_calibration() | {"dynamic": PER_CHANNEL, "weight_only": frozenset({"bits"})},
        takes="tflite",
        needs="litert_torch",
        bits=(4, 8),
    ),
}


class QuantizeConfig(FineTuning):
    """`static` measures the range of every activation on `calibration_samples` beforehand.

    `dynamic` measures it while running, for matrix products and LSTMs only: convolutions would get slower. `qat` first
    trains the model on with the rounding of int8, then does as `static`. `weight_only` stores the weights of matrix
    products in few bits and computes in float: for transformers.
    """

    method: Literal["static", "dynamic", "qat", "weight_only"] = "static"
    backend: Literal["onnxruntime", "torchao", "executorch", "litert"] = "onnxruntime"
    """What runs the outcome: an ONNX graph, a `.pte` or a `.tflite`; of torchao a graph of torch (`.pt2`), or, with
    `dynamic` and `weight_only`, a torch model with int8 weights in its linear layers."""
    calibration: Literal["minmax", "entropy", "percentile"] = "minmax"
    calibration_samples: Count = 256
    calibration_split: Literal["train", "val"] = "train"
    per_channel: Flag = True
    reduce_range: Flag = True
    """7-bit weights: exact where int8 products saturate (AVX2 without VNNI); `false` where they do not."""
    max_drop: dict[str, NonNegative] = Field(default_factory=dict)
    """By how much the metrics of `val` may drop. Until they keep to it, other ranges, layers in float and `dynamic` are
    tried."""
    bits: Literal[4, 8] = 8
    group_size: Literal[16, 32, 64, 128, 256] = 32
    """So many weights in a row share a scale."""
    skip: tuple[str, ...] = ()
    """Patterns of names of layers that stay in float: of the ONNX graph, such as `/head/*`, or the full name of any
    other node of it, such as `/Concat`; torch's for the others."""
    finetune_epochs: NonNegativeInt = 3
    """Of `qat`."""

    @property
    def weights_of_7_bits(self) -> bool:
        """Of `static` and `qat`; the kernels of the other backends do not saturate."""
        return self.reduce_range and "reduce_range" in BACKENDS[self.backend].options["static"]

    @property
    def keeps_torch_model(self) -> bool:
        """Whether the outcome is a torch model, and not a file for a runtime."""
        return self.backend == "torchao" and self.method in ("dynamic", "weight_only")

    @model_validator(mode="after")
    def _options_fit(self) -> "QuantizeConfig":
        backend = BACKENDS[self.backend]
        if self.method not in backend.options:
            able = " or ".join(name for name, other in BACKENDS.items() if self.method in other.options)
            takes = ", ".join(backend.options)
            raise ValueError(f"{self.backend} has no {self.method!r}, only {takes}; for it take the backend {able}")
        every = frozenset().union(*(takes for other in BACKENDS.values() for takes in other.options.values()))
        for option in sorted(self.model_fields_set & every):
            if option not in backend.options[self.method]:
                takes = ", ".join(sorted(backend.options[self.method]))
                by = "" if self.backend == "onnxruntime" else f" by {self.backend}"
                raise ValueError(f"{self.method}{by} takes no {option!r}; it takes {takes}")
        if self.calibration not in backend.calibrations:
            raise ValueError(f"{self.backend} calibrates by minmax alone; {self.calibration} is of onnxruntime")
        if self.bits not in backend.bits:
            able = " or ".join(name for name, other in BACKENDS.items() if self.bits in other.bits)
            raise ValueError(f"{self.backend} stores {self.bits} bits in 8 on a CPU; take the backend {able}")
        if self.method == "qat" and not self.finetune_epochs:
            raise ValueError("qat learns in training; give it finetune_epochs, or take static")
        return self


def _check(config: QuantizeConfig, view: ConfigView) -> Iterator[str]:
    backend = BACKENDS[config.backend]
    for kind, given in view.inputs["model"]:
        if kind.name == "quantize":
            yield "inputs.model: it is quantized already; name the stage before it"
        elif config.method == "qat":
            yield from check_trainable(view, slot="model")
            yield from check_tuning(config, view)
        elif config.keeps_torch_model:
            yield from check_trainable(view, slot="model")
        elif isinstance(given, ExportConfig) and given.format != backend.takes:
            yield (
                f"inputs.model: a model in the format {given.format!r} cannot be quantized for {config.backend}, which "
                f"takes {backend.takes!r}; name the stage before it"
            )
    if backend.needs and (problem := missing(backend.needs)) is not None:
        yield f"config.backend: {config.backend!r}: {problem}"
    for metric in config.max_drop:
        yield from check_metric(metric, view, place=f"config.max_drop.{metric}", splits=("val",))


def _workload(config: QuantizeConfig) -> dict[str, int]:
    return {"epochs": config.finetune_epochs} if config.method == "qat" else {}


def _params_used(config: QuantizeConfig, inputs: Mapping[str, Sequence[Record]]) -> Mapping[str, Any]:
    return params_of_tuning(config, inputs["model"][0], trains=config.method == "qat")


@stage(
    "quantize",
    inputs={"model": "model"},
    output="model",
    version=3,
    measured="later",
    workload=_workload,
    check=_check,
    params_used=_params_used,
)
def quantize(context: StageContext, config: QuantizeConfig) -> StageResult:
    """Quantize the model in the slot `model` and compare the outcome with it."""
    from heliostat.stages.models import train_config_of, workshop_of
    from heliostat.stages.passes.quantize import quantize_model

    source = context.one("model")
    quantized = quantize_model(workshop_of(context, train_config_of(source)), source, config)
    return replace(quantized, params=source.record.params)
