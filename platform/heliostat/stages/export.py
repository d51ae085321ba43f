"""`export`: a model that runs without its training code."""

from collections.abc import Iterator
from typing import Literal

from heliostat.core.model import Spec
from heliostat.core.stage import ConfigView, StageContext, StageResult, stage
from heliostat.stages.checks import UNTRAINABLE


class ExportConfig(Spec):
    """ONNX with a free batch size; the operator set is the newest that torch's exporters write."""

    format: Literal["onnx"] = "onnx"


def _check(config: ExportConfig, view: ConfigView) -> Iterator[str]:
    for kind, _ in view.inputs["model"]:
        if kind.name in UNTRAINABLE:
            yield f"inputs.model: what {kind.name!r} makes is exported already; name the stage before it"


@stage("export", inputs={"model": "model"}, output="model", check=_check, measured="later")
def export(context: StageContext, config: ExportConfig) -> StageResult:
    """Export the model in the slot `model` and compare the outcome, loaded again, with it."""
    from heliostat.compression.export import save_onnx
    from heliostat.stages.models import describe, parity, samples, torch_model, train_config_of

    source = context.one("model")
    recipe = train_config_of(source)
    model = torch_model(source)
    files = save_onnx(model, context.folder, example=samples(context.task, recipe, split="val", count=2))
    return StageResult(
        files=files,
        params=source.record.params,
        details={
            "opset": describe(context.folder)["opset"],
            "parity": {"source": parity(context, recipe, model, against=source.node)},
        },
    )
