"""What a model costs to run, measured: latency, throughput and memory, and how far its outputs are from another's.

Models that are compared are timed in one process, in short turns, so that a machine that slows down slows all of them
down alike. A figure in milliseconds means little without its batch size and threads: both are in the metric's name or
in the record.
"""

import ctypes
import gc
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from heliostat.compression.formats import Model
from heliostat.compression.parity import AT_ONCE

Runnable = Callable[[Tensor], Any]
Name = TypeVar("Name", bound=Hashable)

TURN_S = 0.01
"""How long one model runs before it is the next one's turn. The first run of a turn is a warm-up and not counted."""
ROUNDS = 5
"""A measurement is spread over so many rounds of all batch sizes: a short disturbance hits only one of them."""
MIN_RUNS = 5
"""In each round."""


# --- speed ----------------------------------------------------------------------------------------------------------


def measure_speed(
    models: Mapping[Name, tuple[Runnable, Tensor]],
    *,
    batches: Sequence[int] = (1, 32),
    threads: int = 1,
    min_seconds: float = 0.3,
    rounds: int = ROUNDS,
) -> dict[Name, dict[str, float]]:
    """The speed of each model as metrics, all timed in turns in this process, by default on one thread.

    `latency_ms`, `latency_ms_p95` and `latency_ms_p99` are at batch 1, `latency_ms_b32` and so on at 32, and
    `throughput_per_s` is rows per second at the largest batch. Each model is timed for `min_seconds` at each batch
    size, with the garbage collector off; a torch module runs in eval and inference mode.

    Args:
        models: for each name what is to be timed and rows of its inputs, which are repeated to make each batch. Real
            data: the speed may depend on it.
    """
    times_ns: dict[int, dict[Name, list[int]]] = {size: {name: [] for name in models} for size in batches}
    with _steady(threads, [model for model, _ in models.values()]):
        runs = {name: _runnable(model, threads) for name, (model, _) in models.items()}
        for _ in range(rounds):
            for size, so_far in times_ns.items():
                turns = {name: (runs[name], _batch(rows, size)) for name, (_, rows) in models.items()}
                for name, times in _take_turns(turns, min_seconds=min_seconds / rounds).items():
                    so_far[name] += times
    return {name: _speed({size: times_ns[size][name] for size in batches}) for name in models}


def _batch(rows: Tensor, size: int) -> Tensor:
    return rows.repeat(-(-size // len(rows)), *[1] * (rows.ndim - 1))[:size]


def _take_turns(models: Mapping[Name, tuple[Runnable, Tensor]], *, min_seconds: float) -> dict[Name, list[int]]:
    """The times of the runs of each model, in ns: at least `MIN_RUNS`, and `min_seconds` of them."""
    times_ns: dict[Name, list[int]] = {name: [] for name in models}
    waiting = list(models)
    while waiting:
        for name in waiting:
            times_ns[name] += _turn(*models[name])
        waiting = [n for n in waiting if len(times_ns[n]) < MIN_RUNS or sum(times_ns[n]) < min_seconds * 1e9]
    return times_ns


def _speed(times_ns: Mapping[int, Sequence[int]]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for size, times in times_ns.items():
        suffix = "" if size == 1 else f"_b{size}"
        p50_ns, p95_ns, p99_ns = np.percentile(times, [50, 95, 99])
        metrics[f"latency_ms{suffix}"] = float(p50_ns) / 1e6
        metrics[f"latency_ms{suffix}_p95"] = float(p95_ns) / 1e6
        metrics[f"latency_ms{suffix}_p99"] = float(p99_ns) / 1e6
        if size == max(times_ns):
            metrics["throughput_per_s"] = size / float(p50_ns) * 1e9
    return metrics


@contextmanager
def _steady(threads: int, models: Sequence[Runnable]) -> Iterator[None]:
    """So many threads, no garbage collection, and the torch modules among `models` in eval and inference mode."""
    before, collects = torch.get_num_threads(), gc.isenabled()
    training = [model for model in models if isinstance(model, nn.Module) and model.training]
    torch.set_num_threads(threads)
    gc.collect()
    gc.disable()
    try:
        for module in training:
            module.eval()
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.train()
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


# --- memory ---------------------------------------------------------------------------------------------------------


def peak_memory_mb(load: Callable[[], Runnable], batch: Tensor) -> float | None:
    """By how much this process grows at most while a model is loaded and runs `batch`, in MB (10^6 bytes).

    It is the second time that counts, so that what is only loaded once, such as a runtime's library, does not. None
    where the system does not tell: only Linux does.
    """
    high_water = Path("/proc/self/clear_refs")
    if not high_water.exists():
        return None
    before = 0
    gc.collect()
    for _ in range(2):
        ctypes.CDLL(None).malloc_trim(0)  # or memory that was freed before would be used again, unseen
        high_water.write_text("5")
        before = _memory_kb("VmRSS")
        with torch.no_grad():
            load()(batch)
    return (_memory_kb("VmHWM") - before) * 1024 / 1e6


def _memory_kb(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


# --- outputs --------------------------------------------------------------------------------------------------------


def compare_outputs(a: Runnable, b: Runnable, inputs: Tensor, *, batch_size: int = AT_ONCE) -> dict[str, float]:
    """How far the outputs of two models are apart over the rows of `inputs`: `max_abs_diff` and `mean_abs_diff`, and
    `argmax_agreement`, the fraction of decisions over dim 1 that are the same, where there is more than one output.
    """
    with torch.no_grad():
        outputs_a, outputs_b = (
            torch.cat([m(rows) for rows in torch.split(inputs, batch_size)]).double() for m in (a, b)
        )
    differences = (outputs_a - outputs_b).abs().masked_fill(outputs_a == outputs_b, 0)  # infinite in both is the same
    figures = {"max_abs_diff": float(differences.max()), "mean_abs_diff": float(differences.mean())}
    if outputs_a.ndim > 1 and outputs_a.shape[1] > 1:
        agree = outputs_a.argmax(dim=1) == outputs_b.argmax(dim=1)
        figures["argmax_agreement"] = float(agree.double().mean())
    return figures
