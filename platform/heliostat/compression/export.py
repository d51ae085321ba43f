"""From a torch model to an ONNX artifact that runs without the training code, proven by running it.

Two exporters come with torch. The tracing one takes 0.02 to 0.2 s, the `torch.export` one 1 to 12 s for the same
graphs, but only the latter understands, or refuses, control flow that depends on the data. So the tracing one is asked
first, and its graph is taken if it traced without a doubt and computes what the model computes, at a batch size other
than the one it was traced with too. Otherwise the other one has to do it, and passes the same test.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning

from heliostat.compression.formats import describe_input, load_model, write_record
from heliostat.compression.macs import num_macs
from heliostat.compression.quiet import quiet
from heliostat.errors import ArtifactError, StageError

OPSET = 20
"""The newest that both exporters write."""
TORCH = Path(torch.__file__).parent
"""Where torch's own layers are. They check their arguments in ways that the tracer warns of, and are safe to trace."""
TOLERANCE = 1e-3
"""The largest difference of an output from the torch model's, relative to the largest output (or to 1)."""


def save_onnx(model: nn.Module, folder: Path, *, example: Tensor, opset: int = OPSET) -> list[str]:
    """Save `model` as one ONNX file with its weights inside and a free batch size. Returns the names of the files.

    Args:
        example: a batch that the model takes. Better real data than noise: the export is checked on it.
        opset: the version of the ONNX operators; 20 is the default and the newest that both exporters write.

    Raises:
        StageError: neither exporter gives a graph that computes what the model does; the text has their reasons.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = copy.deepcopy(model).eval().cpu()
    example = example.detach().cpu()
    example = torch.cat([example, example])[: max(2, len(example))]  # of one row, torch.export makes a constant batch
    checks = [example[:1], torch.cat([example, example[:1]])]
    with torch.no_grad():
        expected = [model(batch) for batch in checks]
    if not all(isinstance(outputs, Tensor) for outputs in expected):
        raise StageError(
            f"only a model with one output tensor can be exported; this one gives a {type(expected[0]).__name__}"
        )

    reasons = []
    for name, export in EXPORTERS.items():
        reason = export(model, example, folder / "model.onnx", opset)
        if reason is None:
            record = {"format": "onnx", "input": {"name": "input", **describe_input(example)}, "opset": opset}
            record["macs"] = num_macs(model, example)
            write_record(folder, {**record, "exporter": name, "quantization": None})
            reason = _difference(folder, checks, expected)
        if reason is None:
            return ["model.json", "model.onnx"]
        reasons.append(f"{name}: {reason}")
    raise StageError("the model cannot be exported to ONNX. " + " ".join(reasons))


def _trace(model: nn.Module, example: Tensor, file: Path, opset: int) -> str | None:
    """Export with the tracing exporter. Returns why the result cannot be trusted, or None."""
    try:
        with quiet() as warned:
            torch.onnx.export(
                model,
                (example,),
                file,
                dynamo=False,
                opset_version=opset,
                input_names=["input"],
                output_names=["output"],
                dynamic_axes={"input": {0: "batch"}, "output": {0: "batch"}},
            )
    except Exception as error:  # the exporter, and the model under it, may raise anything
        return _first_lines(error)
    doubts = [w for w in warned if issubclass(w.category, TracerWarning) and TORCH not in Path(w.filename).parents]
    if doubts:
        return f"{doubts[0].filename}:{doubts[0].lineno}: {str(doubts[0].message).partition('. ')[0]}."
    return None


def _torch_export(model: nn.Module, example: Tensor, file: Path, opset: int) -> str | None:
    """Export with the exporter that goes through `torch.export`. Returns why it failed, or None."""
    try:
        with quiet():
            torch.onnx.export(
                model,
                (example,),
                file,
                dynamo=True,
                opset_version=opset,
                external_data=False,
                input_names=["input"],
                output_names=["output"],
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
                verbose=False,
            )
    except Exception as error:  # as above
        return _first_lines(error.__cause__ or error)
    return None


EXPORTERS: dict[str, Callable[[nn.Module, Tensor, Path, int], str | None]] = {
    "trace": _trace,
    "torch.export": _torch_export,
}
"""In the order in which they are asked."""


def _difference(folder: Path, checks: list[Tensor], expected: list[Tensor]) -> str | None:
    try:
        exported = load_model(folder)
        outputs = [exported(batch) for batch in checks]
    except ArtifactError as error:
        return str(error)
    except Exception as error:  # ONNX Runtime's exceptions have no common base but this
        return f"the exported graph does not run: {_first_lines(error)}"
    for batch, got, wanted in zip(checks, outputs, expected):
        if got.shape != wanted.shape:
            return f"the exported graph gives the shape {tuple(got.shape)} where the model gives {tuple(wanted.shape)}"
        worst = float((got - wanted).abs().max())
        if not worst <= TOLERANCE * max(1.0, float(wanted.abs().max())):
            return f"the exported graph's outputs differ by {worst:.2g} at a batch of {len(batch)}"
    return None


def _first_lines(error: BaseException, limit: int = 300) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= limit else text[:limit] + ' ...'}"
