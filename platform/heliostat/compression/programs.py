"""From a torch model to a file that `torch.export` starts: `.pt2` (torch), `.tflite` (LiteRT) or `.pte` (ExecuTorch).

Each is proven twice on real data: the exported graph against the model, layer by layer if they part, and then the file,
loaded again. A `.pt2` takes a batch of any size. A device takes one input at a time, and LiteRT's converter knows no
free batch, so a `.tflite` and a `.pte` are made for one row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from heliostat.compression.formats import describe_input, load_model, write_record
from heliostat.compression.macs import num_macs
from heliostat.compression.parametrizations import bake, copied
from heliostat.compression.parity import (
    AT_ONCE,
    TOLERANCE,
    allowed,
    apart,
    check_parity,
    difference,
    require_one_tensor,
    seeded,
    values_of_program,
)
from heliostat.compression.quiet import quiet
from heliostat.compression.refusal import reason
from heliostat.compression.runtimes import row_by_row
from heliostat.compression.size import count_parameters
from heliostat.core.extras import missing
from heliostat.errors import StageError

NUM_CHECKED_ROWS = 32
"""Of the exported graph, of which the file is made."""


@dataclass(frozen=True)
class Converter:
    """How a file is made of an exported program."""

    convert: Callable[[ExportedProgram, Path], None]
    free_batch: bool
    needs: str | None = None
    """The package that an extra brings."""


def save_program(
    model: nn.Module, folder: Path, *, example: Tensor, format: str, batch_size: int = AT_ONCE
) -> list[str]:
    """Save `model` in one of the formats of `CONVERTERS`. Returns the names of the files.

    Args:
        example: a batch that the model takes, of real data: all of its rows are checked.
        batch_size: how many rows are computed at once.

    Raises:
        StageError: the package for it is not installed; the model cannot be exported, with the line of its code; what
            is exported or converted does not compute what the model does, with the first layer where they part.
    """
    converter = CONVERTERS[format]
    require_package(format)
    model, example = copied(model).eval().cpu(), example.detach().cpu()
    bake(model, example[:batch_size])
    require_one_tensor(seeded(model, example[:1]))
    program = exported(model, example, free_batch=converter.free_batch)
    graph = program.module(check_guards=False)
    check_parity(
        model,
        graph if converter.free_batch else row_by_row(graph),
        example[:NUM_CHECKED_ROWS],
        what="the graph of torch.export",
        values=lambda rows: values_of_program(program, rows),
        batch_size=batch_size,
    )

    count, nonzero = count_parameters(model)
    record = {
        "input": describe_input(example),
        "macs": num_macs(model, example),
        "num_params": count,
        "num_nonzero": nonzero,
        "quantization": None,
    }
    wanted = seeded(model, example, batch_size=batch_size)
    return write_program(
        program, folder, format=format, record=record, example=example, wanted=wanted, batch_size=batch_size
    )


def write_program(
    program: ExportedProgram,
    folder: Path,
    *,
    format: str,
    record: Mapping[str, Any],
    example: Tensor,
    wanted: Tensor,
    tolerance: float = TOLERANCE,
    batch_size: int = AT_ONCE,
) -> list[str]:
    """Convert a graph to one of the formats of `CONVERTERS` and prove the file by running it. Returns the files' names.

    Args:
        record: what `model.json` says, but for the format.
        wanted: what the graph gives for the rows of `example`.
        tolerance: how far the file's outputs may be from that, relative to the largest (or to 1).
        batch_size: how many rows are computed at once.

    Raises:
        StageError: it cannot be converted; the file does not compute what the graph does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"model.{format}"
    try:
        with quiet():
            CONVERTERS[format].convert(program, file)
    except Exception as error:  # converters raise all kinds
        raise StageError(f"the model cannot be converted to {format}. {reason(error)}") from error
    write_record(folder, {**record, "format": format})
    found = seeded(load_model(folder), example, batch_size=batch_size)
    if found.shape != wanted.shape or apart(found, wanted, tolerance):
        raise StageError(
            f"{file.name} does not answer as the model: outputs differ by {difference(found, wanted):.3g}, tolerance "
            f"{allowed(wanted, tolerance):.3g}. All layers of the exported graph agree: the conversion to {format} errs"
        )
    return ["model.json", file.name]


def require_package(format: str) -> None:
    """Raises StageError, which says what to install, if the package that writes the format is not there."""
    needs = CONVERTERS[format].needs
    if needs and (problem := missing(needs)) is not None:
        raise StageError(f"the format {format!r}: {problem}")


def exported(model: nn.Module, example: Tensor, *, free_batch: bool) -> ExportedProgram:
    """The graph of `model`, for a batch of any size or for one row.

    Raises:
        StageError: it cannot be exported, with the line of the user's code.
    """
    rows = torch.cat([example, example])[:2] if free_batch else example[:1]  # of one row, the batch becomes constant
    shapes = ({0: Dim.DYNAMIC},) if free_batch else None
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(model, (rows,), dynamic_shapes=shapes)
    except Exception as error:  # torch.export, and the model under it, may raise anything
        raise StageError(f"the model cannot be exported. {reason(error)}") from error


def _to_pt2(program: ExportedProgram, file: Path) -> None:
    program.example_inputs = None  # a row of the user's data has no place in the file, nor have lines of their code
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    torch.export.save(program, file)


def _to_tflite(program: ExportedProgram, file: Path) -> None:
    import litert_torch

    arguments, _ = program.example_inputs or ((), {})
    litert_torch.convert(program.module(check_guards=False), arguments).export(str(file))


def _to_pte(program: ExportedProgram, file: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    file.write_bytes(lowered.to_executorch().buffer)


CONVERTERS: dict[str, Converter] = {
    "pt2": Converter(_to_pt2, free_batch=True),
    "tflite": Converter(_to_tflite, free_batch=False, needs="litert_torch"),
    "pte": Converter(_to_pte, free_batch=False, needs="executorch"),
}
"""By format."""
