"""`export`: a model that runs without its training code."""

from collections.abc import Iterator
from typing import Literal

from heliostat.core.extras import missing
from heliostat.core.model import Spec
from heliostat.core.stage import ConfigView, StageContext, StageResult, stage
from heliostat.stages.checks import UNTRAINABLE

NEEDS = {"tflite": "litert_torch", "pte": "executorch"}
"""The package that a format needs and an extra brings."""


class ExportConfig(Spec):
    """ONNX has a free batch size, and the newest operator set that torch's exporters write."""

    format: Literal["onnx", "pt2", "tflite", "pte"] = "onnx"
    """`pt2` is of `torch.export`, run by torch; `tflite` (LiteRT) and `pte` (ExecuTorch) take one row at a time."""


def _check(config: ExportConfig, view: ConfigView) -> Iterator[str]:
    for kind, _ in view.inputs["model"]:
        if kind.name in UNTRAINABLE:
            yield f"inputs.model: what {kind.name!r} makes is exported already; name the stage before it"
    if config.format in NEEDS and (problem := missing(NEEDS[config.format])) is not None:
        yield f"config.format: {config.format!r}: {problem}"


@stage("export", inputs={"model": "model"}, output="model", check=_check, measured="later")
def export(context: StageContext, config: ExportConfig) -> StageResult:
    """Export the model in the slot `model` and compare the outcome, loaded again, with it: too far apart, it fails."""
    from heliostat.compression.export import save_onnx
    from heliostat.compression.programs import save_program
    from heliostat.stages.models import describe, parity, samples, torch_model, train_config_of, workshop_of
    from heliostat.stages.passes.workshop import PARITY_SAMPLES

    source = context.one("model")
    recipe = train_config_of(source)
    model = torch_model(source)
    example = samples(context.task, recipe, split="val", count=PARITY_SAMPLES)
    if config.format == "onnx":
        files = save_onnx(model, context.folder, example=example, batch_size=recipe.rows_at_once())
    else:
        files = save_program(
            model, context.folder, example=example, format=config.format, batch_size=recipe.rows_at_once()
        )
    details = {"opset": describe(context.folder)["opset"]} if config.format == "onnx" else {}
    return StageResult(
        files=[*files, *workshop_of(context, recipe).save_loss()],
        params=source.record.params,
        details={**details, "parity": {"source": parity(context, recipe, model, against=source.node)}},
    )
