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
Uncalibrated = Callable[[Path, Path, Workshop, QuantizeConfig], Files]


@dataclass(frozen=True)
class Tool:
    """What one backend quantizes with."""

    export: Callable[..., Files]
    """Saves a torch model, with an `example`, in the format that the others start from."""
    layers_of: Callable[[Path], list[str]]
    """The names that `skip` matches, of an artifact in that format."""
    static: Callable[[Path, Path, Workshop, QuantizeConfig, Sequence[Tensor], Sequence[str]], Files]
    """From the artifact in one folder to another, with calibration data and patterns of layers that stay in float."""
    uncalibrated: Mapping[str, Uncalibrated] = field(default_factory=dict)
    """The same by a method that needs no data."""


# --- ONNX Runtime ---------------------------------------------------------------------------------------------------


def _static_onnx(
    exact: Path,
    target: Path,
    shop: Workshop,
    config: QuantizeConfig,
    calibration: Sequence[Tensor],
    skip: Sequence[str],
) -> Files:
    return post_training.static(
        exact,
        target,
        calibration=calibration,
        per_channel=config.per_channel,
        method=config.calibration,
        reduce_range=config.reduce_range,
        skip=skip,
    )


def _dynamic_onnx(exact: Path, target: Path, shop: Workshop, config: QuantizeConfig) -> Files:
    return post_training.dynamic(exact, target, reduce_range=config.reduce_range, skip=config.skip)


def _weight_only_onnx(exact: Path, target: Path, shop: Workshop, config: QuantizeConfig) -> Files:
    return post_training.weight_only(exact, target, bits=config.bits, group_size=config.group_size, skip=config.skip)


# --- graphs of torch.export -----------------------------------------------------------------------------------------


def _static_pt2e(
    exact: Path,
    target: Path,
    shop: Workshop,
    config: QuantizeConfig,
    calibration: Sequence[Tensor],
    skip: Sequence[str],
    *,
    backend: pt2e.Backend,
) -> Files:
    return pt2e.static(
        exact,
        target,
        backend=backend,
        example=shop.samples("val", PARITY_SAMPLES),
        calibration=calibration,
        per_channel=config.per_channel,
        reduce_range=config.weights_of_7_bits,
        skip=skip,
    )


def _dynamic_pte(exact: Path, target: Path, shop: Workshop, config: QuantizeConfig) -> Files:
    example = shop.samples("val", PARITY_SAMPLES)
    return pt2e.dynamic(exact, target, example=example, skip=config.skip)


# --- LiteRT ---------------------------------------------------------------------------------------------------------


def _static_tflite(
    exact: Path,
    target: Path,
    shop: Workshop,
    config: QuantizeConfig,
    calibration: Sequence[Tensor],
    skip: Sequence[str],
) -> Files:
    return litert.static(exact, target, calibration=calibration, per_channel=config.per_channel, skip=skip)


def _dynamic_tflite(exact: Path, target: Path, shop: Workshop, config: QuantizeConfig) -> Files:
    return litert.dynamic(exact, target, skip=config.skip)


def _weight_only_tflite(exact: Path, target: Path, shop: Workshop, config: QuantizeConfig) -> Files:
    return litert.weight_only(exact, target, bits=config.bits, skip=config.skip)


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
