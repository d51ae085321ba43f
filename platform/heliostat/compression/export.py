"""From a torch model to an ONNX artifact that runs without the training code, proven by running it.

Two exporters come with torch. The tracing one takes 0.02 to 0.2 s, the `torch.export` one 1 to 12 s for the same
graphs, but only the latter understands, or refuses, control flow that depends on the data. So the tracing one is asked
first, and its graph is taken if it traced without a doubt and computes what the model computes, at a batch size other
than the one it was traced with too. Otherwise the other one has to do it, and passes the same test.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning

from heliostat.compression.formats import describe_input, load_model, write_record
from heliostat.compression.macs import num_macs
from heliostat.compression.parametrizations import bake, copied
from heliostat.compression.parity import (
    AT_ONCE,
    allowed,
    apart,
    difference,
    explain,
    require_one_tensor,
    seeded,
    values_of_graph,
)
from heliostat.compression.quiet import quiet
from heliostat.compression.refusal import first_lines, reason
from heliostat.errors import ArtifactError, StageError

OPSET = 20
"""The newest that both exporters write."""
TORCH = Path(torch.__file__).parent
"""Where torch's own layers are. They check their arguments in ways that the tracer warns of, and are safe to trace."""
Exporter = Callable[..., str | None]
"""Called with the model, an example, the file and the operator set, and `fused=False` to keep the layers apart. Gives
why the result cannot be trusted, or None."""


def save_onnx(
    model: nn.Module, folder: Path, *, example: Tensor, opset: int = OPSET, batch_size: int = AT_ONCE
) -> list[str]:
    """Save `model` as one ONNX file with its weights inside and a free batch size. Returns the names of the files.

    Args:
        example: a batch that the model takes. Better real data than noise: the export is checked on all of its rows.
        opset: the version of the ONNX operators; 20 is the default and the newest that both exporters write.
        batch_size: how many rows are computed at once.

    Raises:
        StageError: neither exporter gives a graph that computes what the model does; the text has their reasons, with
            the line of the user's code or the first layer where the graph and the model part.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model, example = copied(model).eval().cpu(), example.detach().cpu()
    bake(model, example[:batch_size])
    checks = [example[:1], *torch.split(torch.cat([example, example[:1], example[:1]]), batch_size)]
    example = torch.cat([example, example])[:2]  # of one row, torch.export makes a constant batch
    expected = [seeded(model, batch) for batch in checks]
    require_one_tensor(expected[0])
    reasons = []
    for name, export in EXPORTERS.items():
        problem = export(model, example, folder / "model.onnx", opset)
        if problem is None:
            record = {"format": "onnx", "input": {"name": "input", **describe_input(example)}, "opset": opset}
            record["macs"] = num_macs(model, example)
            write_record(folder, {**record, "exporter": name, "quantization": None})
            unfused = partial(export, model, example, opset=opset, fused=False)
            problem = _difference(folder, checks, expected, model=model, unfused=unfused)
        if problem is None:
            return ["model.json", "model.onnx"]
        reasons.append(f"{name}: {problem}")
    raise StageError("the model cannot be exported to ONNX. " + " ".join(reasons))


def _trace(model: nn.Module, example: Tensor, file: Path, opset: int, *, fused: bool = True) -> str | None:
    """Export with the tracing exporter."""
    mode = torch.onnx.TrainingMode.EVAL if fused else torch.onnx.TrainingMode.PRESERVE  # the latter fuses no batch norm
    try:
        with quiet() as warned:
            torch.onnx.export(
                model,
                (example,),
                file,
                dynamo=False,
                training=mode,
                opset_version=opset,
                input_names=["input"],
                output_names=["output"],
                dynamic_axes={"input": {0: "batch"}, "output": {0: "batch"}},
            )
    except Exception as error:  # the exporter, and the model under it, may raise anything
        return reason(error)
    doubts = [w for w in warned if issubclass(w.category, TracerWarning) and TORCH not in Path(w.filename).parents]
    if doubts:
        return f"{doubts[0].filename}:{doubts[0].lineno}: {str(doubts[0].message).partition('. ')[0]}."
    return None


def _torch_export(model: nn.Module, example: Tensor, file: Path, opset: int, *, fused: bool = True) -> str | None:
    """Export with the exporter that goes through `torch.export`."""
    try:
        with quiet():
            torch.onnx.export(
                model,
                (example,),
                file,
                dynamo=True,
                optimize=fused,
                opset_version=opset,
                external_data=False,
                input_names=["input"],
                output_names=["output"],
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
                verbose=False,
            )
    except Exception as error:  # as above
        return reason(error.__cause__ or error)
    return None


EXPORTERS: dict[str, Exporter] = {
    "trace": _trace,
    "torch.export": _torch_export,
}
"""In the order in which they are asked."""


def _difference(
    folder: Path,
    checks: list[Tensor],
    expected: list[Tensor],
    *,
    model: nn.Module,
    unfused: Callable[..., str | None],
) -> str | None:
    """Why the exported graph does not do what the model does, or None."""
    try:
        exported = load_model(folder)
        outputs = [seeded(exported, batch) for batch in checks]
    except ArtifactError as error:
        return str(error)
    except Exception as error:  # ONNX Runtime's exceptions have no common base but this
        return f"the exported graph does not run: {first_lines(error)}"
    for batch, got, wanted in zip(checks, outputs, expected):
        if got.shape != wanted.shape:
            return f"the exported graph gives the shape {tuple(got.shape)} where the model gives {tuple(wanted.shape)}"
        if apart(got, wanted):
            return (
                f"the exported graph's outputs differ by {difference(got, wanted):.2g} at a batch of {len(batch)}, "
                f"tolerance {allowed(wanted):.2g}. {_where(model, batch, unfused)}"
            )
    return None


def _where(model: nn.Module, batch: Tensor, unfused: Callable[..., str | None]) -> str:
    """The layer where the graph and the model part, looked for in a graph that keeps all layers apart."""
    with TemporaryDirectory() as scratch:
        file = Path(scratch, "unfused.onnx")
        problem = unfused(file=file)
        return problem or explain(model, values_of_graph(file, model, batch), batch)
