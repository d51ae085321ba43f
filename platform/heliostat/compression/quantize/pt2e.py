"""int8 in a graph of `torch.export`, by torchao's PT2E: from one `.pt2` artifact to another, or to a `.pte`.

A quantizer knows what its backend runs in int8, PT2E puts the conversions there, reads the ranges off calibration data
and stores the weights in int8 (https://docs.pytorch.org/ao/stable/tutorials_source/pt2e_quant_x86_inductor.html).

    torchao     X86InductorQuantizer: u8 activations, s8 weights. torch runs the graph as it is written, converting back
                to float around each layer, so it is smaller and slower than float: a graph for a compiler to fuse
    executorch  XNNPACKQuantizer: s8 activations and weights, in the int8 kernels of XNNPACK. They round each layer
                as the graph does, but for a step now and then
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from heliostat.compression.formats import read_record
from heliostat.compression.layers import names_matching
from heliostat.compression.parity import AT_ONCE, TOLERANCE, seeded
from heliostat.compression.programs import exported, require_package, write_program
from heliostat.compression.quantize.calibration import checked
from heliostat.compression.quiet import quiet
from heliostat.compression.refusal import first_lines
from heliostat.compression.verdict import has_int8_instructions
from heliostat.errors import ArtifactError, StageError

Backend = Literal["torchao", "executorch"]

WEIGHTED = {
    "conv1d": "Conv",
    "conv2d": "Conv",
    "conv3d": "Conv",
    "conv_transpose1d": "ConvTranspose",
    "conv_transpose2d": "ConvTranspose",
    "linear": "Linear",
    "lstm": "LSTM",
    "gru": "GRU",
}
"""The operators with weights of a graph, and what they are called in a record."""
EPS = 2**-12
"""The smallest scale, as in torchao's own settings."""


@dataclass(frozen=True)
class _Settings:
    dynamic: bool
    per_channel: bool
    reduce_range: bool
    exact: frozenset[str]
    """The layers that stay in float."""


@dataclass(frozen=True)
class _Target:
    format: str
    quantizer: Callable[[_Settings], Any]
    tolerance: float
    """How far the file may be from the graph, relative to its largest output."""


def static(
    source: Path,
    target: Path,
    *,
    backend: Backend,
    example: Tensor,
    calibration: Iterable[Tensor],
    per_channel: bool = True,
    reduce_range: bool = False,
    skip: Sequence[str] = (),
    batch_size: int = AT_ONCE,
) -> list[str]:
    """Quantize the convolutions and linear layers of the `.pt2` artifact in `source` to int8, into `target`.

    Args:
        example: a batch of real inputs: the file is checked on all of its rows.
        calibration: batches of inputs from the training split; a range is the smallest and the largest value seen.
        per_channel: one scale per output channel of a weight, instead of one per weight.
        reduce_range: 7-bit weights, for processors whose int8 products saturate; XNNPACK's do not.
        skip: patterns (as of `fnmatch`) of names of the model's layers that stay in float.
        batch_size: how many rows of the example are computed at once.

    Returns:
        The names of the files written.

    Raises:
        SpecError: a pattern that matches no layer.
        StageError: no calibration data, or data that is not finite; nothing in the graph that can be quantized; the
            backend's package is not installed, or it cannot convert the graph; the file does not compute the same.
    """
    batches = checked(calibration)
    made = _Settings(
        dynamic=False, per_channel=per_channel, reduce_range=reduce_range, exact=frozenset(_matching(source, skip))
    )
    settings = {"calibration": "minmax", "calibration_rows": sum(map(len, batches)), "reduce_range": reduce_range}
    told = {"method": "static", **settings}
    return _quantize(source, target, backend, made, example, batches, told, batch_size)


def dynamic(
    source: Path, target: Path, *, example: Tensor, skip: Sequence[str] = (), batch_size: int = AT_ONCE
) -> list[str]:
    """Quantize the linear layers of the `.pt2` artifact in `source` for ExecuTorch, with ranges found at every call.

    There is a scale for each output channel: XNNPACK has no kernel for one of a weight. Arguments, outcome and errors
    are those of `static`.
    """
    made = _Settings(dynamic=True, per_channel=True, reduce_range=False, exact=frozenset(_matching(source, skip)))
    return _quantize(source, target, "executorch", made, example, [example[:1]], {"method": "dynamic"}, batch_size)


def layers_of(source: Path) -> list[str]:
    """The names of the layers with weights of the `.pt2` artifact in `source`, as `skip` matches them."""
    return list(dict.fromkeys(name for node in _weighted(_graph(source)) if (name := _layer(node))))


def _quantize(
    source: Path,
    target: Path,
    backend: Backend,
    settings: _Settings,
    example: Tensor,
    batches: Sequence[Tensor],
    told: Mapping[str, Any],
    batch_size: int,
) -> list[str]:
    runtime = TARGETS[backend]
    require_package(runtime.format)
    record, graph = read_record(source), _graph(source)
    free_batch = runtime.format == "pt2"
    with quiet(), torch.no_grad():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        try:
            prepared = prepare_pt2e(graph, runtime.quantizer(settings))
            for batch in batches:
                seeded(prepared, batch)
            quantized = convert_pt2e(prepared)
        except Exception as error:  # PT2E asserts much about a graph
            raise StageError(f"PT2E cannot quantize the model for {backend}. {first_lines(error)}") from error
    int8, left_in_float = count_ops(quantized)
    if not int8:
        found = ", ".join(f"{count} {op}" for op, count in left_in_float.items()) or "no layer with weights"
        raise StageError(
            f"{told['method']} quantization by {backend} finds nothing to quantize (the graph has {found})"
        )
    _drop_unused(quantized)
    quantization = {
        "backend": backend,
        **told,
        "per_channel": settings.per_channel,
        "int8_ops": int8,
        "float_ops": left_in_float,
        "int8_instructions": has_int8_instructions(),
    }
    return write_program(
        exported(quantized, example, free_batch=free_batch),
        target,
        format=runtime.format,
        record={**record, "quantization": quantization},
        example=example,
        wanted=seeded(quantized, example, batch_size=batch_size),
        batch_size=batch_size,
        tolerance=runtime.tolerance,
    )


# --- quantizers -----------------------------------------------------------------------------------------------------


def _x86(settings: _Settings) -> Any:
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    config = _observed(get_default_x86_inductor_quantization_config())
    limits = {"quant_min": -64, "quant_max": 64} if settings.reduce_range else {"quant_min": -127, "quant_max": 127}
    config = replace(config, weight=replace(config.weight, **limits))
    quantizer = X86InductorQuantizer().set_global(config if settings.per_channel else _per_weight(config))
    for layer in settings.exact:
        quantizer.set_module_name_qconfig(layer, None)
    return quantizer


def _xnnpack(settings: _Settings) -> Any:
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )

    config = get_symmetric_quantization_config(is_per_channel=settings.per_channel, is_dynamic=settings.dynamic)
    quantizer = XNNPACKQuantizer().set_global(config if settings.dynamic else _observed(config))
    return quantizer.set_filter_function(lambda node: _layer(node) not in settings.exact)


def _observed(config: Any) -> Any:
    """The config with ranges from the smallest and the largest value; torchao's own drop what is rare."""
    from torchao.quantization.pt2e import MinMaxObserver

    spec = replace(config.input_activation, observer_or_fake_quant_ctr=MinMaxObserver.with_args(eps=EPS))
    return replace(config, input_activation=spec, output_activation=spec)


def _per_weight(config: Any) -> Any:
    from torchao.quantization.pt2e import MinMaxObserver

    observer = MinMaxObserver.with_args(eps=EPS)
    one = {"qscheme": torch.per_tensor_symmetric, "ch_axis": None, "observer_or_fake_quant_ctr": observer}
    return replace(config, weight=replace(config.weight, **one))


TARGETS: dict[Backend, _Target] = {
    "torchao": _Target("pt2", _x86, tolerance=TOLERANCE),
    "executorch": _Target("pte", _xnnpack, tolerance=0.05),
}
"""By backend."""


# --- graphs ---------------------------------------------------------------------------------------------------------


def _graph(source: Path) -> fx.GraphModule:
    record = read_record(source)
    if record["format"] != "pt2":
        raise ArtifactError(f"{source} is in the format {record['format']!r}; export it to pt2 first")
    if record["quantization"]:
        raise ArtifactError(f"{source} is quantized already ({record['quantization']['method']})")
    with quiet():
        graph = torch.export.load(source / "model.pt2").module(check_guards=False)
    assert isinstance(graph, fx.GraphModule)
    return graph


def _matching(source: Path, skip: Sequence[str]) -> Iterator[str]:
    layers = layers_of(source) if skip else []
    for pattern in skip:
        yield from names_matching(layers, pattern, option="skip")


def _weighted(graph: fx.GraphModule) -> Iterator[fx.Node]:
    return (node for node in graph.graph.nodes if _operator(node) in WEIGHTED)


def _operator(node: fx.Node) -> str:
    """`linear` of `aten.linear.default`; nothing of what is no operator."""
    return node.target._opname if isinstance(node.target, torch._ops.OpOverload) else ""


def _layer(node: fx.Node) -> str:
    """The innermost module that the node is of; empty for the model itself."""
    inside = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return inside[-1] if inside else ""


def count_ops(graph: fx.GraphModule) -> tuple[dict[str, int], dict[str, int]]:
    """How many layers of a graph have weights in int8, and how many in float, by kind of operator."""
    counts: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    for node in _weighted(graph):
        weight = node.args[1]
        in_float = not (isinstance(weight, fx.Node) and _operator(weight).startswith("dequantize"))
        counts[in_float][WEIGHTED[_operator(node)]] += 1
    return dict(counts[False]), dict(counts[True])


def _drop_unused(graph: fx.GraphModule) -> None:
    """Take out of the module what no node reads, such as the weights as they were: all of it would be in the file."""
    used = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    for name in [*dict(graph.named_parameters()), *dict(graph.named_buffers())]:
        if name not in used:
            owner, _, attribute = name.rpartition(".")
            module: nn.Module = graph.get_submodule(owner)
            delattr(module, attribute)
