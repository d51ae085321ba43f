"""What every model artifact is measured for, whichever stage made it. A run calls both functions as Ray tasks.

Quality is computed beside other work. Speed is measured with every CPU of a node held, since a busy neighbour falsifies
it, and of all models that wait for it in one go, in turns: only so can they be compared with each other.
"""

import math
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from heliostat.core.artifact import Record
from heliostat.core.spec import Task
from heliostat.core.stage import Validated
from heliostat.errors import StageError
from heliostat.stages.saved import check_saved
from heliostat.training.config import CPU_ROWS, TrainConfig

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from torch.utils.data import Dataset

    from heliostat.compression.formats import Model
    from heliostat.training.task import Metric, Objective

R = TypeVar("R")
SECONDS_PER_BATCH_SIZE = 0.1
"""Every CPU of a node waits while speed is measured; so many seconds give thousands of runs of a small network."""
SECONDS_ON_ALL_THREADS = 0.02
"""For the same on every CPU, in one round: only the typical run is reported."""
LOADED_AT_ONCE_MB = 2000.0
"""Larger models are measured in several groups, each with the models that its members came from."""


@dataclass(frozen=True)
class Speed:
    """What was measured of one model: its metrics, and how they compare with the model that it came from."""

    metrics: Mapping[str, float]
    details: Mapping[str, Any]
    """`session` names the measurement: figures of one session can be compared. `speedup` and `why_not_faster` at
    batch 1, and with the ending `_b32` at 32, say how it compares with its source; there is none without one."""


@dataclass(frozen=True)
class Subject:
    """A model to be timed."""

    folder: Path
    params: Mapping[str, Any]
    """The record's, which say how it was trained and so on which data."""
    method: str
    """What was done to it."""
    source: Path | None = None
    """The folder of the model that it came from."""


def folders_of(subjects: Iterable[Subject]) -> set[Path]:
    return {folder for subject in subjects for folder in (subject.folder, subject.source) if folder}


def with_speed(record: Record, speed: Speed) -> Record:
    metrics, details = {**record.metrics, **speed.metrics}, {**record.details, "speed": speed.details}
    return replace(record, metrics=metrics, details=details)


def timed(function: Callable[..., R], *args: Any) -> tuple[R, float]:
    """What a function gives, and the seconds that it took where it ran."""
    started = time.monotonic()
    return function(*args), time.monotonic() - started


def recipe_of(params: Mapping[str, Any]) -> TrainConfig:
    """How the model was trained, as the record's params carry it from stage to stage; an own stage may not say."""
    return TrainConfig.model_validate(params.get("train", {}))


def call_example(
    folder: Path, task: Task, params: Mapping[str, Any]
) -> "tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]":
    """A batch of two real inputs of the model and its outputs, which say how it is to be called."""
    from heliostat.compression.formats import load_model
    from heliostat.stages.models import samples

    inputs = samples(task, recipe_of(params), split="val", count=2)
    return inputs.numpy(), load_model(folder)(inputs).numpy()


@dataclass(frozen=True)
class Quality:
    """The figures of a model that are no speed."""

    figures: Mapping[str, float]
    missing: Mapping[str, str]
    """By name, why a figure is missing or has no interval."""


def measure_quality(
    folder: Path, task: Task, params: Mapping[str, Any], validated: Validated | None = None
) -> dict[str, float]:
    """Return the figures of `assess_quality`."""
    return dict(assess_quality(folder, task, params, validated).figures)


def assess_quality(folder: Path, task: Task, params: Mapping[str, Any], validated: Validated | None = None) -> Quality:
    """Loss and metrics on `val`, which choices use, and on `test`, which is only reported; size and arithmetic.

    `val_accuracy_low` and `val_accuracy_high` are the ends of the 95 % interval of `val_accuracy`, and so on; a
    metric that is slow to compute, or fails on a resample, has none. A metric that fails on `test` is missing.

    Raises StageError where the figures of `val` are not those `validated`.
    """
    from heliostat.compression.formats import load_model
    from heliostat.compression.size import num_nonzero, num_params, size_mb, size_zip_mb
    from heliostat.stages.models import describe
    from heliostat.training.evaluation import evaluate
    from heliostat.training.task import build_data, build_objective
    from heliostat.training.trained_loss import load_loss

    model = load_model(folder)
    recipe = recipe_of(params)
    batch_size = recipe.rows_at_once()
    data, objective = build_data(task, recipe.data_args), build_objective(task, load_loss(folder))
    figures: dict[str, float] = {
        "size_mb": size_mb(folder),
        "size_zip_mb": size_zip_mb(folder),
        "num_params": num_params(folder),
        "num_nonzero": num_nonzero(folder),
    }
    if (macs := describe(folder).get("macs")) is not None:  # an own stage may write a model in its own way
        figures["num_macs"] = macs
    missing: dict[str, str] = {}
    for split in ("val", "test"):
        if split in data:
            quality = evaluate_with_intervals(model, data[split], objective, split=split, batch_size=batch_size)
            figures |= quality.figures
            missing |= quality.missing
        if split == "val" and validated is not None:
            again = partial(evaluate, model, data["val"], objective, split="val", batch_size=batch_size)
            check_saved(folder, validated, figures, data=data, again=again)
    return Quality(figures, missing)


def evaluate_with_intervals(
    model: "Callable[[Tensor], Tensor]",
    dataset: "Dataset[Any]",
    objective: "Objective",
    *,
    split: str,
    batch_size: int = CPU_ROWS,
) -> Quality:
    """Return what `evaluate` does, and the ends of the 95 % interval of each metric that has one.

    Raises StageError for a metric that fails, unless on `test`: nothing is chosen by that split, so the model is kept.
    """
    from heliostat.compression.bootstrap import NoIntervalError, confidence_interval
    from heliostat.training.evaluation import evaluate

    ends: dict[str, float] = {}
    missing: dict[str, str] = {}

    def noting(metric: "Metric") -> "Metric":
        name = f"{split}_{metric.name}"

        def function(outputs: "Tensor", targets: "Tensor") -> float:
            try:
                value = metric.value(outputs, targets, split=split)
            except StageError as error:
                if split != "test":
                    raise
                missing[name] = str(error)
                return math.nan
            try:
                ends.update(
                    zip((f"{name}_low", f"{name}_high"), confidence_interval(metric.function, outputs, targets))
                )
            except NoIntervalError as reason:
                missing[f"{name}_low"] = f"no interval: {reason}"
            return value

        return replace(metric, function=function)

    noted = replace(objective, metrics=tuple(noting(metric) for metric in objective.metrics))
    figures = evaluate(model, dataset, noted, split=split, batch_size=batch_size) | ends
    return Quality({name: figure for name, figure in figures.items() if name not in missing}, missing)


def measure_speeds(subjects: Sequence[Subject], task: Task) -> list[Speed | str]:
    """Latency (p50, p95, p99) at batch 1 and 32 and throughput of each model on real samples, all in turns.

    They are of one thread; the names of those of all end in `_all_threads`. Memory is for loading and a batch of 32.
    The models that they came from are timed with them. Of a model that does not load or run, the reason is given.
    """
    session = uuid.uuid4().hex
    measured: dict[Path, Speed | str] = {}
    for group in _groups(subjects):
        measured |= _measure_group(group, task, session)
    return [measured[subject.folder] for subject in subjects]


def _groups(subjects: Sequence[Subject]) -> Iterator[list[Subject]]:
    """The subjects in groups whose models, with those that they came from, can be loaded at once."""
    from heliostat.compression.size import size_mb

    group: list[Subject] = []
    loaded: dict[Path, float] = {}
    for subject in subjects:
        more = {folder: size_mb(folder) for folder in (subject.folder, subject.source) if folder is not None}
        if group and sum({**loaded, **more}.values()) > LOADED_AT_ONCE_MB:
            yield group
            group, loaded = [], {}
        group.append(subject)
        loaded |= more
    if group:
        yield group


def _measure_group(group: Sequence[Subject], task: Task, session: str) -> dict[Path, Speed | str]:
    from heliostat.compression.formats import load_model
    from heliostat.compression.measure import measure_speed, peak_memory_mb

    ready: dict[Path, tuple[Callable[[Tensor], Any], Tensor]] = {}
    failed: dict[Path, Speed | str] = {}
    for subject in group:
        for folder in (subject.folder, subject.source):
            if folder is not None and folder not in ready:
                try:
                    ready[folder] = _load(folder, task, subject.params)
                except Exception as error:  # a user's model may raise anything; the others are measured all the same
                    failed[subject.folder] = f"its speed cannot be measured: {type(error).__name__}: {error}"
    figures = measure_speed(ready, min_seconds=SECONDS_PER_BATCH_SIZE)
    on_all = measure_speed(ready, threads=len(os.sched_getaffinity(0)), min_seconds=SECONDS_ON_ALL_THREADS, rounds=1)
    for folder, (_, rows) in ready.items():
        typical = {name: figure for name, figure in on_all[folder].items() if "_p9" not in name}
        figures[folder] |= {f"{name}_all_threads": figure for name, figure in typical.items()}
        if (grown := peak_memory_mb(partial(load_model, folder), rows)) is not None:
            figures[folder]["peak_memory_mb"] = grown
    measured = {
        subject.folder: Speed(figures[subject.folder], {"session": session, **_against_source(subject, figures)})
        for subject in group
        if subject.folder not in failed
    }
    return {**measured, **failed}


def _load(folder: Path, task: Task, params: Mapping[str, Any]) -> "tuple[Model, Tensor]":
    """The model, after a first run, and rows of its inputs."""
    from heliostat.compression.formats import load_model
    from heliostat.stages.models import samples

    model, rows = load_model(folder), samples(task, recipe_of(params), split="val", count=32)
    model(rows)
    return model, rows


def _against_source(subject: Subject, figures: Mapping[Path, Mapping[str, float]]) -> dict[str, Any]:
    """How much faster than the model that it came from, and if it is not, why."""
    from heliostat.compression.size import num_params
    from heliostat.compression.verdict import CAUSES, why_not_faster
    from heliostat.stages.models import describe

    if subject.source is None:
        return {}
    facts = describe(subject.folder).get("quantization") or {
        "params_ratio": num_params(subject.folder) / num_params(subject.source)
    }
    own, source = figures[subject.folder], figures[subject.source]
    compared: dict[str, Any] = {}
    for suffix in ("", "_b32"):
        latency_ms = own[f"latency_ms{suffix}"]
        compared[f"speedup{suffix}"] = speedup = source[f"latency_ms{suffix}"] / latency_ms
        if subject.method in CAUSES:
            why = why_not_faster(speedup, method=subject.method, facts=facts, latency_ms=latency_ms)
            compared |= {f"why_not_faster{suffix}": why} if why else {}
    return compared
