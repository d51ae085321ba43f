"""How large a model is: its parameters, those that are not zero, and the files that are deployed."""

import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from heliostat.compression.formats import deployed_files, load_torch, read_record

CHUNK_BYTES = 1 << 24


def num_params(model: nn.Module | Path) -> int:
    """The number of parameters of a torch model, or of the artifact in a folder.

    In an ONNX graph these are the numbers in its constant tensors, a quantised one counted once; scales, zero points,
    scalars and the integers that only say shapes and axes are not parameters. A `.pt2`, `.tflite` or `.pte` has as many
    as the torch model that it was made of.
    """
    if isinstance(model, nn.Module):
        return sum(p.numel() for p in model.parameters())
    return COUNTS[read_record(model)["format"]](model)[0]


def num_nonzero(folder: Path) -> int:
    """How many parameters of the artifact are not zero. All weights stored in blocks of few bits count."""
    return COUNTS[read_record(folder)["format"]](folder)[1]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """The parameters of a torch model, and how many of them are not zero."""
    parameters = list(model.parameters())
    dense = [p.dequantize() if hasattr(p, "qdata") else p for p in parameters]  # torchao's own tensors cannot count
    return sum(p.numel() for p in parameters), sum(int(p.count_nonzero()) for p in dense)


def size_mb(folder: Path) -> float:
    """The size of the deployed weights or graph in MB (10^6 bytes), without code and records."""
    return sum(file.stat().st_size for file in deployed_files(folder)) / 1e6


def size_zip_mb(folder: Path) -> float:
    """The same after deflate, as in a zip: what zeros and few distinct values save on the way to a device."""
    total = 0
    for file in deployed_files(folder):
        packer = zlib.compressobj()
        with file.open("rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                total += len(packer.compress(chunk))
        total += len(packer.flush())
    return total / 1e6


def _count_torch(folder: Path) -> tuple[int, int]:
    return count_parameters(load_torch(folder))


def _count_onnx(folder: Path) -> tuple[int, int]:
    import onnx
    from onnx.numpy_helper import to_array

    graph = onnx.load(folder / "model.onnx").graph
    tensors = {t.name: t for t in graph.initializer}
    zeros = dict(_zero_points(graph, tensors))
    no_parameters = {f"{name.removesuffix('_quantized')}{end}" for name in tensors for end in ("_scale", "_zero_point")}
    in_blocks = 0
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            no_parameters.update(node.input[1:])
        elif node.op_type == "MatMulNBits":
            no_parameters.update(node.input[1:4])
            in_blocks += math.prod(a.i for a in node.attribute if a.name in ("K", "N"))
    count = nonzero = in_blocks
    for name, tensor in tensors.items():
        if tensor.dims and name not in no_parameters and tensor.data_type != onnx.TensorProto.INT64:
            count += math.prod(tensor.dims)
            nonzero += int(np.count_nonzero(to_array(tensor) != zeros.get(name, 0)))
    return count, nonzero


def _zero_points(graph: Any, tensors: Any) -> Iterator[tuple[str, Any]]:
    """Of each quantised tensor what stands for zero in it, shaped to be compared with it."""
    from onnx.numpy_helper import to_array

    for name in tensors:
        if f"{name.removesuffix('_quantized')}_zero_point" in tensors and name.endswith("_quantized"):
            zero = to_array(tensors[f"{name.removesuffix('_quantized')}_zero_point"])
            if zero.size == 1:
                yield name, zero.reshape(())
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and len(node.input) == 3 and {*node.input[::2]} <= tensors.keys():
            zero = to_array(tensors[node.input[2]])
            shape = [1] * len(tensors[node.input[0]].dims)
            if zero.size > 1:
                shape[next((a.i for a in node.attribute if a.name == "axis"), 1)] = -1
            yield node.input[0], zero.reshape(shape)


def _as_recorded(folder: Path) -> tuple[int, int]:
    """Of the torch model that the file was made of."""
    record = read_record(folder)
    return record["num_params"], record["num_nonzero"]


COUNTS: dict[str, Callable[[Path], tuple[int, int]]] = {
    "torch": _count_torch,
    "onnx": _count_onnx,
    "pt2": _as_recorded,
    "tflite": _as_recorded,
    "pte": _as_recorded,
}
"""By format: the parameters, and those that are not zero."""
