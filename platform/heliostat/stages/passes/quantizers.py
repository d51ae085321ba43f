"""How each backend quantizes: from an artifact in float to another one, each in a folder."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor

from heliostat.compression.export import save_onnx
from heliostat.compression.programs import save_program
from heliostat.compression.quantize import litert, post_training, pt2e
from heliostat.stages.passes.workshop import PARITY_SAMPLES, Workshop
from heliostat.stages.quantize import QuantizeConfig

Files = list[str]


@dataclass(frozen=True)
class Job:
    """What is quantized, into which folder, and how."""

    exact: Path
    """The artifact in float, in the format that the backend starts from."""
    target: Path
    shop: Workshop
    config: QuantizeConfig
    skip: Sequence[str]
    """Patterns of layers that stay in float."""
    calibration: Sequence[Tensor] = ()

    @property
    def example(self) -> Tensor:
        """A batch of validation data."""
        return self.shop.samples("val", PARITY_SAMPLES)


Quantize = Callable[[Job], Files]


@dataclass(frozen=True)
class Tool:
    """What one backend quantizes with."""

    export: Callable[..., Files]
    """Saves a torch model, with an `example`, in the format that the others start from."""
    layers_of: Callable[[Path], list[str]]
    """The names that `skip` matches, of an artifact in that format."""
    static: Quantize
    uncalibrated: Mapping[str, Quantize] = field(default_factory=dict)
    """The methods that need no calibration data."""


# --- ONNX Runtime ---------------------------------------------------------------------------------------------------


def _static_onnx(job: Job) -> Files:
    return post_training.static(
        job.exact,
        job.target,
        calibration=job.calibration,
        per_channel=job.config.per_channel,
        method=job.config.calibration,
        reduce_range=job.config.reduce_range,
        skip=job.skip,
    )


def _dynamic_onnx(job: Job) -> Files:
    return post_training.dynamic(job.exact, job.target, reduce_range=job.config.reduce_range, skip=job.skip)


def _weight_only_onnx(job: Job) -> Files:
    config = job.config
    return post_training.weight_only(
        job.exact, job.target, bits=config.bits, group_size=config.group_size, skip=job.skip
    )


# --- graphs of torch.export -----------------------------------------------------------------------------------------


def _static_pt2e(job: Job, *, backend: pt2e.Backend) -> Files:
    return pt2e.static(
        job.exact,
        job.target,
        backend=backend,
        example=job.example,
        calibration=job.calibration,
        per_channel=job.config.per_channel,
        reduce_range=job.config.weights_of_7_bits,
        skip=job.skip,
        batch_size=job.shop.batch_size,
    )


def _dynamic_pte(job: Job) -> Files:
    return pt2e.dynamic(job.exact, job.target, example=job.example, skip=job.skip, batch_size=job.shop.batch_size)


# --- LiteRT ---------------------------------------------------------------------------------------------------------


def _static_tflite(job: Job) -> Files:
    per_channel = job.config.per_channel
    return litert.static(job.exact, job.target, calibration=job.calibration, per_channel=per_channel, skip=job.skip)


def _dynamic_tflite(job: Job) -> Files:
    return litert.dynamic(job.exact, job.target, skip=job.skip)


def _weight_only_tflite(job: Job) -> Files:
    return litert.weight_only(job.exact, job.target, bits=job.config.bits, skip=job.skip)


TOOLS: Mapping[str, Tool] = {
    "onnxruntime": Tool(
        save_onnx, post_training.layers_of, _static_onnx, {"dynamic": _dynamic_onnx, "weight_only": _weight_only_onnx}
    ),
    "torchao": Tool(partial(save_program, format="pt2"), pt2e.layers_of, partial(_static_pt2e, backend="torchao")),
    "executorch": Tool(
        partial(save_program, format="pt2"),
        pt2e.layers_of,
        partial(_static_pt2e, backend="executorch"),
        {"dynamic": _dynamic_pte},
    ),
    "litert": Tool(
        partial(save_program, format="tflite"),
        litert.layers_of,
        _static_tflite,
        {"dynamic": _dynamic_tflite, "weight_only": _weight_only_tflite},
    ),
}
"""By backend."""
