"""Which tensors of an int8 ONNX graph lose most by their rounding: the layers to blame when a model falls.

Each tensor is compared with itself before it was rounded, inside the int8 graph, so that what was lost before does not
count. A matrix product mixes all channels of its inputs, so their errors are taken together. What reaches the outputs
unmixed is looked at channel by channel: there one channel with a small range beside a large one is lost, though the
tensor as a whole looks fine.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from heliostat.compression.parity import AT_ONCE

BAD_DB = 20.0
"""A tenth of the signal is noise. Activations in 8 bits have 30 to 45 dB."""
MIXING = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN"})
NAMED = 3
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class RoundingError:
    """What rounding leaves of one tensor of a graph."""

    layer: str
    """The node that computes it, or the name of the graph's input."""
    kind: str
    """The node's operator."""
    sqnr_db: float
    """Signal to quantization noise; where channels are not mixed, that of the worst one."""

    def __str__(self) -> str:
        return f"{self.layer} ({self.sqnr_db:.0f} dB)"


def rounding_errors(int8: Path, inputs: Tensor, *, batch_size: int = AT_ONCE) -> list[RoundingError]:
    """Of each rounded activation of the ONNX graph in the file `int8`, the worst first; `batch_size` rows at a time.

    A graph without rounded activations, such as one with dynamic ranges, has none.
    """
    import onnx
    import onnxruntime

    graph = onnx.load(int8)
    constants = {tensor.name: tensor for tensor in graph.graph.initializer}
    producer = {name: node for node in graph.graph.node for name in node.output}
    consumers: dict[str, list[Any]] = {}
    for node in graph.graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    pairs = [
        (node, after.output[0])
        for node in graph.graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] not in constants
        for after in consumers.get(node.output[0], ())
        if after.op_type == "DequantizeLinear"
    ]
    outputs = {output.name for output in graph.graph.output}
    names = list(dict.fromkeys(name for node, after in pairs for name in (node.input[0], after)))
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in outputs)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0].name
    computed = [session.run(names, {given: rows.numpy()}) for rows in torch.split(inputs, batch_size)]
    values = {name: np.concatenate(parts) for name, parts in zip(names, zip(*computed))}
    found = []
    for node, after in pairs:
        name = node.input[0]
        made_by = producer.get(name)
        signal = values[name]
        if made_by is not None and not onnx.numpy_helper.to_array(constants[node.input[2]]).any():
            signal = np.maximum(signal, 0)  # a Relu is left out where the rounding cuts off what is below 0
        is_mixed = after not in outputs and all(reader.op_type in MIXING for reader in consumers.get(after, ()))
        found.append(
            RoundingError(
                made_by.name if made_by is not None else name,
                made_by.op_type if made_by is not None else "input",
                sqnr_db(signal, values[after], by_channel=not is_mixed),
            )
        )
    return sorted(found, key=lambda error: error.sqnr_db)


def blamed(errors: Sequence[RoundingError]) -> list[RoundingError]:
    """Those that lose so much that a fall is theirs."""
    return [error for error in errors if error.sqnr_db < BAD_DB]


def sqnr_db(signal: Array, rounded: Array, *, by_channel: bool) -> float:
    """The variance of the signal over that of the noise, of all values or of the worst channel along axis 1."""
    signal, noise = signal.astype(np.float64), rounded.astype(np.float64) - signal
    axes = tuple(axis for axis in range(signal.ndim) if axis != 1) if by_channel and signal.ndim > 1 else None
    power, lost = signal.var(axis=axes), np.square(noise).mean(axis=axes)
    ratio = np.where(power > 0, power / np.maximum(lost, 1e-30), np.inf)  # what does not change carries nothing
    return float(10 * math.log10(max(float(np.min(ratio)), 1e-6)))
