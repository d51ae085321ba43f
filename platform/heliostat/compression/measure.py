"""What a model costs, measured: parameters, size of what is deployed, latency and throughput, and how far its outputs
are from those of the model that it came from.

Models that are compared are timed in one process, in short turns, so that a machine that slows down slows all of them
down alike. A figure in milliseconds means little without its batch size and threads: both are in the metric's name or
in the record.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from heliostat.compression.formats import Model, deployed_files, load_torch, read_record

Runnable = Callable[[Tensor], Any]

TURN_S = 0.01
"""How long one model runs before it is the next one's turn. The first run of a turn is a warm-up and not counted."""
ROUNDS = 5
"""A measurement is spread over so many rounds of all batch sizes: a short disturbance hits only one of them."""
MIN_RUNS = 5
"""In each round."""


# --- size -----------------------------------------------------------------------------------------------------------


def num_params(model: nn.Module | Path) -> int:
    """The number of parameters of a torch model, or of the artifact in a folder.

    In an ONNX graph these are the numbers in its constant tensors, a quantised one counted once; scales, zero points,
    scalars and the integers that only say shapes and axes are not parameters.
    """
    if isinstance(model, nn.Module):
        return sum(p.numel() for p in model.parameters())
    return NUM_PARAMS[read_record(model)["format"]](model)


def _num_params_onnx(folder: Path) -> int:
    import onnx

    graph = onnx.load(folder / "model.onnx").graph
    tensors = {t.name: t for t in graph.initializer}
    scaling = {f"{name.removesuffix('_quantized')}{end}" for name in tensors for end in ("_scale", "_zero_point")}
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scaling.update(node.input[1:])
    parameters = [
        t for name, t in tensors.items() if t.dims and name not in scaling and t.data_type != onnx.TensorProto.INT64
    ]
    return sum(math.prod(t.dims) for t in parameters)


NUM_PARAMS: dict[str, Callable[[Path], int]] = {
    "torch": lambda folder: num_params(load_torch(folder)),
    "onnx": _num_params_onnx,
}


def size_mb(folder: Path) -> float:
    """The size of the deployed weights or graph in MB (10^6 bytes), without code and records."""
    return sum(file.stat().st_size for file in deployed_files(folder)) / 1e6


# --- speed ----------------------------------------------------------------------------------------------------------


def latency(
    models: Mapping[str, Runnable], batch: Tensor, *, threads: int = 1, min_seconds: float = 0.3, min_runs: int = 20
) -> dict[str, dict[str, float]]:
    """How long each model takes for `batch`: `{name: {"p50_ms", "p95_ms", "runs"}}`.

    Each model is timed for `min_seconds` and `min_runs`, whichever takes longer, in turns with the others, with the
    garbage collector off and on `threads` threads. A torch module runs in eval and inference mode.
    """
    times_ns = _times_ns(models, batch, threads=threads, min_seconds=min_seconds, min_runs=min_runs)
    return {name: _summary(times) for name, times in times_ns.items()}


def _times_ns(
    models: Mapping[str, Runnable], batch: Tensor, *, threads: int, min_seconds: float, min_runs: int
) -> dict[str, list[int]]:
    with _steady(threads):
        runs = {name: _runnable(model, threads) for name, model in models.items()}
        times_ns: dict[str, list[int]] = {name: [] for name in models}
        training = [m for m in models.values() if isinstance(m, nn.Module) and m.training]
        try:
            for module in training:
                module.eval()
            waiting = list(runs)
            while waiting:
                for name in waiting:
                    times_ns[name] += _turn(runs[name], batch)
                waiting = [n for n in waiting if len(times_ns[n]) < min_runs or sum(times_ns[n]) < min_seconds * 1e9]
        finally:
            for module in training:
                module.train()
    return times_ns


def _summary(times_ns: Sequence[int]) -> dict[str, float]:
    p50, p95 = np.percentile(times_ns, [50, 95])
    return {"p50_ms": float(p50) / 1e6, "p95_ms": float(p95) / 1e6, "runs": len(times_ns)}


def measure_speed(
    model: Runnable,
    *,
    example: Tensor,
    baseline: Runnable | None = None,
    batches: Sequence[int] = (1, 32),
    threads: int = 1,
    min_seconds: float = 0.3,
) -> dict[str, float]:
    """The speed of `model` as metrics, by default on one thread.

    `latency_ms` and `latency_ms_p95` are at batch 1, `latency_ms_b32` and `latency_ms_b32_p95` at 32 and so on, and
    `throughput_per_s` is rows per second at the largest batch. With a `baseline`, timed in turns with the model,
    `speedup` (batch 1) and `speedup_b32` say how many times faster than it the model is.

    Args:
        example: rows of inputs, repeated to make each batch. Real data: the speed may depend on it.
    """
    timed = {"model": model} | ({"baseline": baseline} if baseline else {})
    times_ns: dict[int, dict[str, list[int]]] = {size: {name: [] for name in timed} for size in batches}
    for _ in range(ROUNDS):
        for size, so_far in times_ns.items():
            batch = example.repeat(-(-size // len(example)), *[1] * (example.ndim - 1))[:size]
            more = _times_ns(timed, batch, threads=threads, min_seconds=min_seconds / ROUNDS, min_runs=MIN_RUNS)
            for name, times in more.items():
                so_far[name] += times
    metrics: dict[str, float] = {}
    for size, by_model in times_ns.items():
        figures = {name: _summary(times) for name, times in by_model.items()}
        suffix = "" if size == 1 else f"_b{size}"
        metrics[f"latency_ms{suffix}"] = figures["model"]["p50_ms"]
        metrics[f"latency_ms{suffix}_p95"] = figures["model"]["p95_ms"]
        if baseline:
            metrics[f"speedup{suffix}"] = figures["baseline"]["p50_ms"] / figures["model"]["p50_ms"]
        if size == max(batches):
            metrics["throughput_per_s"] = size / figures["model"]["p50_ms"] * 1e3
    return metrics


@contextmanager
def _steady(threads: int) -> Iterator[None]:
    before, collects = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(threads)
    gc.collect()
    gc.disable()
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(before)
        if collects:
            gc.enable()


def _runnable(model: Runnable, threads: int) -> Runnable:
    return model.threads(threads) if isinstance(model, Model) else model


def _turn(run: Runnable, batch: Tensor) -> list[int]:
    """The times of the runs of one turn, in ns; at least one."""
    run(batch)
    clock = time.perf_counter_ns
    times = []
    end = clock() + TURN_S * 1e9
    while True:
        start = clock()
        run(batch)
        stop = clock()
        times.append(stop - start)
        if stop >= end:
            return times


# --- outputs --------------------------------------------------------------------------------------------------------


def compare_outputs(a: Runnable, b: Runnable, inputs: Tensor, *, batch_size: int = 256) -> dict[str, float]:
    """How far the outputs of two models are apart over the rows of `inputs`: `max_abs_diff` and `mean_abs_diff`, and
    `argmax_agreement`, the fraction of decisions over dim 1 that are the same, where there is more than one output.
    """
    with torch.no_grad():
        outputs_a, outputs_b = (
            torch.cat([m(rows) for rows in torch.split(inputs, batch_size)]).double() for m in (a, b)
        )
    differences = (outputs_a - outputs_b).abs()
    figures = {"max_abs_diff": float(differences.max()), "mean_abs_diff": float(differences.mean())}
    if outputs_a.ndim > 1 and outputs_a.shape[1] > 1:
        agree = outputs_a.argmax(dim=1) == outputs_b.argmax(dim=1)
        figures["argmax_agreement"] = float(agree.double().mean())
    return figures
