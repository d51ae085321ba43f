"""int8 for LiteRT, by ai-edge-quantizer: from one `.tflite` artifact to another.

It works on the file, since LiteRT's converter refuses the graphs of PT2E. Inputs and outputs stay float, as does what
LiteRT has no int8 kernel for, with conversions around it. Its products of s8 by s8 do not saturate, so weights have all
8 bits. A layer's name is what the converter keeps of torch's: `encoder.0.head` for `encoder.layers.0.head`, for a list
of modules is never called.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from heliostat.compression.formats import read_record, write_record
from heliostat.compression.layers import names_matching
from heliostat.compression.programs import require_package
from heliostat.compression.quantize.calibration import checked
from heliostat.compression.quiet import quiet
from heliostat.compression.refusal import first_lines
from heliostat.compression.verdict import has_int8_instructions
from heliostat.errors import ArtifactError, StageError

WEIGHTED = {
    "CONV_2D": "Conv",
    "DEPTHWISE_CONV_2D": "Conv",
    "TRANSPOSE_CONV": "ConvTranspose",
    "FULLY_CONNECTED": "Linear",
}
"""The operators with weights, and what they are called in a record. The weights are their second input."""
WEIGHTED_CLASS = re.compile(r"torch\.nn\.modules\.(conv|linear)\.\w+$|\.MultiheadAttention_\w+$")
"""Ends the name of a layer with weights."""
ALL = ".*"
"""Matches every operator's scope."""


def static(
    source: Path,
    target: Path,
    *,
    calibration: Iterable[Tensor],
    per_channel: bool = True,
    skip: Sequence[str] = (),
) -> list[str]:
    """Quantize weights and activations of the `.tflite` artifact in `source` to int8, into `target`.

    Args:
        calibration: batches of inputs from the training split; a range is the smallest and the largest value seen.
        per_channel: one scale per output channel of a weight, instead of one per weight.
        skip: patterns (as of `fnmatch`) of names of layers that stay in float.

    Returns:
        The names of the files written.

    Raises:
        SpecError: a pattern that matches no layer.
        StageError: no calibration data, or data that is not finite; nothing in the graph that can be quantized; the
            package for it is not installed.
    """
    batches = checked(calibration)

    def recipe(manager: Any) -> None:
        manager.add_static_config(ALL, "*", 8, 8, _granularity(per_channel))

    told = {"per_channel": per_channel, "calibration": "minmax", "calibration_rows": sum(map(len, batches))}
    return _quantize(source, target, recipe, skip, {"method": "static", **told}, batches)


def dynamic(source: Path, target: Path, *, skip: Sequence[str] = ()) -> list[str]:
    """Quantize the weights to int8; the kernels find the ranges of activations at every call. As `static` else.

    There is a scale for each output channel: with one for a weight, the kernel of convolutions gave 1e30 for 0.1.
    """

    def recipe(manager: Any) -> None:
        manager.add_dynamic_config(ALL, "*", 8)

    return _quantize(source, target, recipe, skip, {"method": "dynamic", "per_channel": True})


def weight_only(source: Path, target: Path, *, bits: Literal[4, 8] = 8, skip: Sequence[str] = ()) -> list[str]:
    """Store the weights in few bits, with a scale for each output channel, and compute in float. As `static` else."""

    def recipe(manager: Any) -> None:
        manager.add_weight_only_config(ALL, "*", bits)

    return _quantize(source, target, recipe, skip, {"method": "weight_only", "bits": bits})


def layers_of(source: Path) -> list[str]:
    """The names of the layers with weights of the `.tflite` artifact in `source`, as `skip` matches them."""
    return list(dict.fromkeys(layer for layer, _ in _layers(_graph(source))))


def _quantize(
    source: Path,
    target: Path,
    recipe: Callable[[Any], None],
    skip: Sequence[str],
    told: Mapping[str, Any],
    batches: Sequence[Tensor] = (),
) -> list[str]:
    require_package("tflite")
    record, graph = read_record(source), _graph(source)
    exact = {name for pattern in skip for name in names_matching(layers_of(source), pattern, option="skip")}
    with quiet():
        from ai_edge_quantizer.algorithm_manager import AlgorithmName
        from ai_edge_quantizer.quantizer import Quantizer
        from ai_edge_quantizer.recipe_manager import RecipeManager

        manager = RecipeManager()
        recipe(manager)
        for end in ("INPUT", "OUTPUT"):
            manager.add_quantization_config(ALL, end, algorithm_key=AlgorithmName.NO_QUANTIZE)
        for layer, scope in _layers(graph):
            if layer in exact:
                scope = f"^{re.escape(scope)}$"
                manager.add_quantization_config(scope, "*", algorithm_key=AlgorithmName.NO_QUANTIZE)
        try:
            quantizer = Quantizer(str(source / "model.tflite"), manager.get_quantization_recipe())
            made = quantizer.quantize(_ranges(source, manager, batches) if batches else None)
        except Exception as error:  # it raises all kinds
            raise StageError(f"ai-edge-quantizer cannot quantize the model. {first_lines(error)}") from error
        target.mkdir(parents=True, exist_ok=True)
        made.export_model(str(target / "model.tflite"), overwrite=True)
    int8, left_in_float = count_ops(target / "model.tflite")
    if not int8:
        found = ", ".join(f"{count} {op}" for op, count in left_in_float.items()) or "no layer with weights"
        raise StageError(f"{told['method']} quantization by litert finds nothing to quantize (the graph has {found})")
    quantization = {
        "backend": "litert",
        **told,
        "int8_ops": int8,
        "float_ops": left_in_float,
        "int8_instructions": has_int8_instructions(),
    }
    write_record(target, {**record, "quantization": quantization})
    return ["model.json", "model.tflite"]


def _ranges(source: Path, manager: Any, batches: Sequence[Tensor]) -> Any:
    """The range of each tensor over all rows, as the quantizer takes it; its own way averages over the rows."""
    from ai_edge_litert.interpreter import Interpreter
    from ai_edge_quantizer.calibrator import Calibrator
    from ai_edge_quantizer.utils.qsv_utils import min_max_update

    file = source / "model.tflite"
    interpreter = Interpreter(str(file))
    (given,) = interpreter.get_input_details()
    ((signature, ends),) = interpreter.get_signature_list().items()
    (name,) = ends["inputs"]
    rows = [{name: row.numpy().astype(given["dtype"])} for batch in batches for row in torch.split(batch, 1)]
    calibrator = Calibrator(file.read_bytes(), num_threads=1, qsv_update_func=min_max_update)
    calibrator.calibrate({signature: rows}, manager)
    return calibrator.get_model_qsvs()


def _granularity(per_channel: bool) -> Any:
    from ai_edge_quantizer.qtyping import QuantGranularity

    return QuantGranularity.CHANNELWISE if per_channel else QuantGranularity.TENSORWISE


# --- the file -------------------------------------------------------------------------------------------------------


def count_ops(file: Path) -> tuple[dict[str, int], dict[str, int]]:
    """How many layers of a `.tflite` have weights in few bits, and how many in float, by kind of operator."""
    from ai_edge_quantizer.qtyping import TensorType

    graph = _read(file)
    dequantized = {
        tensor for name, operator in _operators(graph) if name == "DEQUANTIZE" for tensor in operator.outputs
    }
    counts: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    for name, operator in _operators(graph):
        if name in WEIGHTED:
            weight = operator.inputs[1]
            few_bits = graph.subgraphs[0].tensors[weight].type in (TensorType.INT8, TensorType.INT4)
            counts[not (few_bits or weight in dequantized)][WEIGHTED[name]] += 1
    return dict(counts[False]), dict(counts[True])


def _graph(source: Path) -> Any:
    record = read_record(source)
    if record["format"] != "tflite":
        raise ArtifactError(f"{source} is in the format {record['format']!r}; export it to tflite first")
    if record["quantization"]:
        raise ArtifactError(f"{source} is quantized already ({record['quantization']['method']})")
    return _read(source / "model.tflite")


def _read(file: Path) -> Any:
    with quiet():
        from ai_edge_quantizer.utils.tfl_flatbuffer_utils import read_model

        return read_model(file.read_bytes())


def _operators(graph: Any) -> Iterator[tuple[str, Any]]:
    """Every operator of the graph with its name."""
    from ai_edge_quantizer.qtyping import BuiltinOperator

    names = {code: name for name, code in vars(BuiltinOperator).items()}
    for operator in graph.subgraphs[0].operators:
        yield names[graph.operatorCodes[operator.opcodeIndex].builtinCode], operator


def _layers(graph: Any) -> Iterator[tuple[str, str]]:
    """Each layer with weights: its name, and the scope by which the quantizer finds its operator."""
    from ai_edge_quantizer.utils.tfl_flatbuffer_utils import get_op_scope, get_tensor_name

    tensors = graph.subgraphs[0].tensors
    for name, operator in _operators(graph):
        if name in WEIGHTED:
            named = [get_tensor_name(tensors[number]) for number in (operator.inputs[1], operator.outputs[0])]
            if layer := _layer(named):
                yield layer, get_op_scope(operator, tensors)


def _layer(tensors: Sequence[str]) -> str:
    """`encoder.head` of `nets.Net/nets.Encoder_encoder/torch.nn.modules.linear.Linear_head;1`, a tensor's name.

    That is classes and names of modules, outermost first. A tensor that was fused out of several has the names of all,
    of which the layer's own is a convolution, a linear layer or attention, or else the innermost; a constant has none.
    """
    paths = [part.partition(";")[0] for tensor in tensors for part in tensor.split(";;") if "/" in part]
    own = [path for path in paths if WEIGHTED_CLASS.search(path)] or sorted(paths, key=lambda path: -path.count("/"))
    modules = own[0].split("/")[1:] if own else []
    return ".".join(module.rpartition(".")[2].partition("_")[2] for module in modules)
