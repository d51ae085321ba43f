"""Weights, and where it pays activations, as 8-bit integers, by ONNX Runtime: from one ONNX artifact to another.

`static` quantises weights and activations, the ranges of the activations taken from calibration data; this is what
makes convolutional networks faster. `dynamic` finds the ranges at every call and needs no data; it suits networks made
of matrix products and LSTMs. GRU layers stay in float with either, LSTM layers with `static`. `weight_only` stores the
weights of matrix products in 8 or 4 bits, in blocks with a scale each, and computes in float: for transformers, whose
time goes into reading weights.

The settings are measured ones. x86 processors without VNNI add pairs of u8 x s8 products in 16 bits, which saturate: on
an AVX2 machine the outputs of a convolutional network were off by 0.54 on average with 8-bit weights and by 0.08 with
7-bit ones (`reduce_range`), at the same speed; so weights have 7 bits unless told otherwise. A convolution quantised
dynamically (ConvInteger) made the same network 2 to 7 times slower than float, so `dynamic` leaves convolutions alone
unless told otherwise. A network of a few microseconds may come out slower as int8 than as float: measure it.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from torch import Tensor

from heliostat.compression.formats import read_record, write_record
from heliostat.compression.layers import names_matching
from heliostat.compression.quantize.calibration import checked
from heliostat.compression.quiet import quiet
from heliostat.compression.verdict import has_int8_instructions
from heliostat.errors import ArtifactError, SpecError, StageError

Method = Literal["minmax", "entropy", "percentile"]

INT8_FORMS = {
    "ConvInteger": "Conv",
    "MatMulInteger": "MatMul",
    "DynamicQuantizeLSTM": "LSTM",
    "QLinearConv": "Conv",
    "QLinearMatMul": "MatMul",
    "MatMulNBits": "MatMul",
}
"""The integer operators that a quantised graph may hold, and what each was before."""

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN")


def static(
    source: Path,
    target: Path,
    *,
    calibration: Iterable[Tensor],
    per_channel: bool = True,
    method: Method = "minmax",
    reduce_range: bool = True,
    skip: Sequence[str] = (),
) -> list[str]:
    """Quantise the ONNX artifact in the folder `source` to int8 (QDQ, u8 activations, s8 weights), into `target`.

    Args:
        calibration: batches of inputs from the training split. A few hundred rows are enough.
        per_channel: one scale per output channel of a weight, instead of one per weight.
        method: how a range is read off the activations: all of it, or clipped by entropy or at the 99.999th percentile.
        reduce_range: 7-bit weights, see above; False is for processors with VNNI and for ARM.
        skip: patterns (as of `fnmatch`) of names of layers of the graph that stay in float.

    Returns:
        The names of the files written.

    Raises:
        SpecError: an unknown method, a pattern that matches no layer.
        StageError: no calibration data, or data that is not finite; nothing in the graph that can be quantised.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    methods = {
        "minmax": CalibrationMethod.MinMax,
        "entropy": CalibrationMethod.Entropy,
        "percentile": CalibrationMethod.Percentile,
    }
    if method not in methods:
        raise SpecError(f"calibration method {method!r} is unknown; known: {', '.join(methods)}")
    record = _onnx_record(source)
    batches = checked(calibration)
    target.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as scratch, quiet():
        prepared = _prepared(source, Path(scratch))
        quantize_static(
            prepared,
            target / "model.onnx",
            _Batches(batches, input_name=record["input"]["name"]),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=per_channel,
            reduce_range=reduce_range,
            calibrate_method=methods[method],
            nodes_to_exclude=_matching(prepared, skip),
        )
    settings = {"per_channel": per_channel, "calibration": method, "calibration_rows": sum(map(len, batches))}
    return _finish(target, record, {"method": "static", "reduce_range": reduce_range, **settings})


def dynamic(
    source: Path, target: Path, *, convolutions: bool = False, reduce_range: bool = True, skip: Sequence[str] = ()
) -> list[str]:
    """Quantise the matrix products, LSTMs and embeddings of the ONNX artifact in `source` to int8, into `target`.

    Args:
        convolutions: quantise these too: a smaller file and, on the processors measured, a slower network.
        reduce_range: 7-bit weights, see above.
        skip: patterns (as of `fnmatch`) of names of layers of the graph that stay in float.

    Returns:
        The names of the files written.

    Raises:
        SpecError: a pattern that matches no layer.
        StageError: nothing in the graph that can be quantised.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    record = _onnx_record(source)
    target.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as scratch, quiet():
        prepared = _prepared(source, Path(scratch))
        quantize_dynamic(
            prepared,
            target / "model.onnx",
            op_types_to_quantize=["MatMul", "Attention", "LSTM", "Gather", *(["Conv"] if convolutions else [])],
            weight_type=QuantType.QInt8,
            reduce_range=reduce_range,
            nodes_to_exclude=_matching(prepared, skip),
        )
    return _finish(target, record, {"method": "dynamic", "reduce_range": reduce_range, "convolutions": convolutions})


def weight_only(
    source: Path, target: Path, *, bits: Literal[4, 8] = 8, group_size: int = 32, skip: Sequence[str] = ()
) -> list[str]:
    """Store the weights of the matrix products of the ONNX artifact in `source` in few bits, into `target`.

    Args:
        group_size: so many weights of a row share a scale and a zero point; a power of two, 16 or more.
        skip: patterns (as of `fnmatch`) of names of layers of the graph that stay in float.

    Returns:
        The names of the files written.

    Raises:
        SpecError: a pattern that matches no layer.
        StageError: no matrix product in the graph.
    """
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.quantization.onnx_model import ONNXModel

    record = _onnx_record(source)
    target.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as scratch, quiet():
        prepared = _prepared(source, Path(scratch))
        exact = [variant for name in _matching(prepared, skip) for variant in (name, f"{name}_MatMul")]
        graph = ONNXModel(onnx.load(prepared))
        graph.replace_gemm_with_matmul()  # which appends `_MatMul` to the names
        quantizer = MatMulNBitsQuantizer(graph.model, bits=bits, block_size=group_size, nodes_to_exclude=exact)
        quantizer.process()
        quantizer.model.save_model_to_file(str(target / "model.onnx"))
    return _finish(target, record, {"method": "weight_only", "bits": bits, "group_size": group_size})


def layers_of(source: Path) -> list[str]:
    """The names of the layers with weights of the ONNX artifact in `source`, as `skip` matches them."""
    with TemporaryDirectory() as scratch, quiet():
        return _layers(_prepared(source, Path(scratch)))


class _Batches:
    """Calibration data as ONNX Runtime asks for it."""

    def __init__(self, batches: Sequence[Tensor], *, input_name: str) -> None:
        self._feeds = iter([{input_name: batch.numpy()} for batch in batches])

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)


def _onnx_record(source: Path) -> dict[str, Any]:
    record = read_record(source)
    if record["format"] != "onnx":
        raise ArtifactError(f"{source} is in the format {record['format']!r}; export it to ONNX first")
    if record["quantization"]:
        raise ArtifactError(f"{source} is quantised already ({record['quantization']['method']})")
    return record


def _prepared(source: Path, scratch: Path) -> Path:
    """The graph with shapes inferred and constants folded, which the quantiser relies on.

    Without the symbolic inference: the exports here do not need it, and it would import sympy (0.6 s).
    """
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = scratch / "prepared.onnx"
    quant_pre_process(source / "model.onnx", prepared, skip_symbolic_shape=True)
    return prepared


def _layers(file: Path) -> list[str]:
    import onnx

    graph = onnx.load(file).graph
    constant = {tensor.name for tensor in graph.initializer}
    return [node.name for node in graph.node if node.op_type in WEIGHTED and node.input[1] in constant]


def _matching(file: Path, skip: Sequence[str]) -> list[str]:
    """The nodes that the patterns name: layers with weights, and by its full name any other."""
    if not skip:
        return []
    import onnx

    layers, others = _layers(file), {node.name for node in onnx.load(file).graph.node}
    return [
        name
        for pattern in skip
        for name in ([pattern] if pattern in others else names_matching(layers, pattern, option="skip"))
    ]


def _finish(target: Path, record: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    int8, left_in_float = count_ops(target / "model.onnx")
    if not int8:
        found = ", ".join(f"{n} {op}" for op, n in left_in_float.items()) or "no layer with weights"
        advice = "use static quantisation" if settings["method"] == "dynamic" and "Conv" in left_in_float else ""
        raise StageError(
            f"{settings['method']} quantisation finds nothing to quantise (the graph has {found})"
            + (f"; {advice}" if advice else "")
        )
    quantization = {
        "backend": "onnxruntime",
        **settings,
        "int8_ops": int8,
        "float_ops": left_in_float,
        "int8_instructions": has_int8_instructions(),
    }
    write_record(target, {**record, "quantization": quantization})
    return ["model.json", "model.onnx"]


def count_ops(file: Path) -> tuple[dict[str, int], dict[str, int]]:
    """How many layers with weights of an ONNX graph compute in int8, and how many in float, by kind of operator."""
    import onnx

    graph = onnx.load(file).graph
    dequantized = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    constant = {tensor.name for tensor in graph.initializer}
    int8: Counter[str] = Counter()
    left: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type in INT8_FORMS:
            int8[INT8_FORMS[node.op_type]] += 1
        elif node.op_type in WEIGHTED and node.input[1] in dequantized:
            int8[node.op_type] += 1
        elif node.op_type in WEIGHTED and node.input[1] in constant:
            left[node.op_type] += 1
    return dict(int8), dict(left)
