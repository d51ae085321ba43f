"""`quantize`: int8 through ONNX Runtime, after training."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

from heliostat.core.artifact import Artifact
from heliostat.core.model import Count, Flag, Spec
from heliostat.core.stage import ConfigView, StageContext, StageResult, stage

if TYPE_CHECKING:
    from torch import Tensor

CALIBRATION_BATCH_SIZE = 64


class QuantizeConfig(Spec):
    """`static` measures the range of every activation on `calibration_samples` of the training split beforehand.

    `dynamic` measures it while running, for matrix products and LSTMs only: convolutions would get slower.
    """

    method: Literal["static", "dynamic"] = "static"
    calibration: Literal["minmax", "entropy", "percentile"] = "minmax"
    calibration_samples: Count = 256
    per_channel: Flag = True
    reduce_range: Flag = True
    """7-bit weights: exact where int8 products saturate (AVX2 without VNNI); `false` where they do not."""


def _check(config: QuantizeConfig, view: ConfigView) -> Iterator[str]:
    for kind, _ in view.inputs["model"]:
        if kind.name == "quantize":
            yield "inputs.model: it is quantized already; name the stage before it"


@stage("quantize", inputs={"model": "model"}, output="model", check=_check, measured="later")
def quantize(context: StageContext, config: QuantizeConfig) -> StageResult:
    """Quantize the model in the slot `model` and compare the outcome with it."""
    import torch

    from heliostat.compression.formats import load_model
    from heliostat.compression.quantize import dynamic, static
    from heliostat.stages.models import describe, parity, samples, train_config_of

    source = context.one("model")
    recipe = train_config_of(source)
    with TemporaryDirectory() as scratch:
        onnx = _as_onnx(source, Path(scratch), example=samples(context.task, recipe, split="val", count=2))
        if config.method == "static":
            calibration = samples(context.task, recipe, split="train", count=config.calibration_samples)
            files = static(
                onnx,
                context.folder,
                calibration=torch.split(calibration, CALIBRATION_BATCH_SIZE),
                per_channel=config.per_channel,
                method=config.calibration,
                reduce_range=config.reduce_range,
            )
        else:
            files = dynamic(onnx, context.folder, reduce_range=config.reduce_range)
    return StageResult(
        files=files,
        params=source.record.params,
        details={
            "quantization": describe(context.folder)["quantization"],
            "parity": {"source": parity(context, recipe, load_model(source.folder), against=source.node)},
        },
    )


def _as_onnx(source: Artifact, scratch: Path, *, example: "Tensor") -> Path:
    """The folder of an ONNX artifact of the model: its own, or one exported into `scratch`."""
    from heliostat.compression.export import save_onnx
    from heliostat.stages.models import describe, torch_model

    if describe(source.folder)["format"] == "onnx":
        return source.folder
    save_onnx(torch_model(source), scratch, example=example)
    return scratch
