"""Why a compressed model is not faster, in words and from facts: what was done to it, on what processor, how small."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FASTER = 1.05
"""From this speed-up on a model is called faster; less is within the noise of the measurement."""
CALL_OVERHEAD_MS = 0.05
"""Below about this a call is mostly overhead: the interpreter, the session, a kernel launch for each operator."""


def why_not_faster(speedup: float, *, method: str, facts: Mapping[str, Any], latency_ms: float) -> str | None:
    """The causes why a model is not faster than the one it came from, or None if it is (`speedup` >= 1.05).

    Args:
        speedup: latency of the model that it came from, divided by its own, at one batch size and number of threads.
        method: what was done: one of `CAUSES`.
        facts: for the ways to quantize the `quantization` entry of its `model.json`; for `structured`, `factorize` and
            `distill` `params_ratio`, its parameters divided by those of the model that it came from. Else empty.
        latency_ms: its own latency.
    """
    if speedup >= FASTER:
        return None
    causes = CAUSES[method](facts)
    if latency_ms < CALL_OVERHEAD_MS:
        causes.append(f"at {latency_ms:.3f} ms a call is mostly overhead; try a larger batch")
    return "; ".join(causes)


def _magnitude(facts: Mapping[str, Any]) -> list[str]:
    return ["its zeros are stored and multiplied like any other weight: no dense kernel skips them (see structured)"]


def _semi_structured(facts: Mapping[str, Any]) -> list[str]:
    return ["only the sparse tensor cores of a GPU skip two zeros of four; a CPU multiplies them"]


def _fewer_parameters(facts: Mapping[str, Any]) -> list[str]:
    ratio = facts["params_ratio"]
    if ratio > 0.9:
        return [f"it still has {ratio:.0%} of the parameters"]
    return [
        "its layers are too narrow, at this batch, for the arithmetic saved to show beside the cost of each operator"
    ]


def _static(facts: Mapping[str, Any]) -> list[str]:
    if facts["backend"] == "torchao":
        return ["torch runs the graph as it is written, each layer in float between conversions: compile it"]
    causes = []
    if not has_int8_instructions():
        causes.append("this processor has no int8 dot-product instructions (VNNI or the like)")
    if facts["float_ops"]:
        causes.append(f"{_list(facts['float_ops'])} stayed in float")
    return [*causes, "converting activations to int8 and back costs time"]


def _dynamic(facts: Mapping[str, Any]) -> list[str]:
    causes = []
    if (convolutions := facts["int8_ops"].get("Conv")) and facts["backend"] == "onnxruntime":
        causes.append(f"{convolutions} convolutions run as ConvInteger, slower than float (see static)")
    if facts["float_ops"]:
        causes.append(f"{_list(facts['float_ops'])} stayed in float")
    return [*causes, "the ranges of the activations are found anew at every call"]


def _weight_only(facts: Mapping[str, Any]) -> list[str]:
    return ["it computes in float: only reading the weights is cheaper, which tells where they are large"]


CAUSES: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "magnitude": _magnitude,
    "semi_structured": _semi_structured,
    "structured": _fewer_parameters,
    "factorize": _fewer_parameters,
    "distill": _fewer_parameters,
    "static": _static,
    "qat": _static,
    "dynamic": _dynamic,
    "weight_only": _weight_only,
    "export": lambda facts: ["the runtime executes the same operators, at the same precision"],
}


def has_int8_instructions() -> bool:
    """Whether the processor has an int8 dot product: VNNI or AMX on x86, `asimddp` on ARM. Only Linux tells."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return bool(flags & {"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8", "asimddp"})


def _list(ops: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {op}" for op, count in ops.items())
