"""Static int8 within `max_drop`: what is tried when it costs too much, in the order of likely gain and cost.

As the file says; with a scale for each channel; with what rounding harms most in float, and with other calibrations;
then layer after layer in float, the most sensitive first; then ranges that are found at every call (`dynamic`). What
keeps within the limits first is taken.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

from torch import Tensor

from heliostat.compression.formats import load_model
from heliostat.compression.quantize.errors import RoundingError, blamed, rounding_errors
from heliostat.compression.quantize.sensitivity import Drops, mix_precision
from heliostat.errors import StageError
from heliostat.stages.passes.quantizers import TOOLS, Job
from heliostat.stages.passes.workshop import Workshop, files_in, write_files
from heliostat.stages.quantize import BACKENDS, QuantizeConfig
from heliostat.training.evaluation import evaluate

INSPECTED_SAMPLES = 32


@dataclass(frozen=True)
class Attempt:
    """A way to quantize."""

    what: str
    """In words, for the record."""
    config: QuantizeConfig
    in_float: tuple[str, ...] = ()
    """The layers that stay in float beside those of `skip`."""
    dynamic: bool = False

    def quantize(self, exact: Path, target: Path, shop: Workshop, calibration: Sequence[Tensor]) -> list[str]:
        """Write the artifact; the names of its files."""
        tool, skip = TOOLS[self.config.backend], [*self.config.skip, *self.in_float]
        quantize = tool.uncalibrated["dynamic"] if self.dynamic else tool.static
        return quantize(Job(exact, target, shop, self.config, skip, calibration))


@dataclass(frozen=True)
class _Given:
    """What every attempt is made of."""

    shop: Workshop
    files: Mapping[str, bytes]
    """Of the artifact in float."""
    calibration: Sequence[Tensor]


@dataclass(frozen=True)
class Found:
    """What keeps within the limits, and what had to be tried."""

    attempt: Attempt
    details: Mapping[str, Any]


def within_max_drop(shop: Workshop, exact: Path, config: QuantizeConfig, calibration: Sequence[Tensor]) -> Found:
    """The first way to quantize by which the metrics of `val` drop by no more than `max_drop`.

    Raises StageError, with the figures of all that was tried, if there is none.
    """
    objective, limits = shop.objective, config.max_drop
    before = evaluate(load_model(exact), shop.data["val"], objective, split="val", batch_size=shop.batch_size)
    given = _Given(shop.portable, files_in(exact), calibration)
    signs = {metric: 1 if objective.mode(metric) == "max" else -1 for metric in limits}
    tried: list[tuple[Attempt, Drops | str]] = []

    def measure(attempts: Sequence[Attempt]) -> list[Drops | str]:
        return [
            after
            if isinstance(after, str)
            else {metric: sign * (before[metric] - after[metric]) for metric, sign in signs.items()}
            for after in shop.side_by_side(_figures, given, attempts)
        ]

    def found(attempt: Attempt, drops: Drops, alone: Mapping[str, Drops] = MappingProxyType({})) -> Found:
        details: dict[str, Any] = {"mixed_precision": {"left_in_float": list(attempt.in_float), "drops": dict(drops)}}
        if len(tried) > 1:
            details |= {"chosen": attempt.what, "tried": [_row(what, outcome, limits) for what, outcome in tried]}
        if alone:
            details["sensitivity"] = [{"layer": layer, **_named(cost)} for layer, cost in alone.items()]
        return Found(attempt, details)

    as_said = Attempt("as the file says", config)
    (drops,) = measure([as_said])
    if isinstance(drops, str):
        raise StageError(drops)
    tried.append((as_said, drops))
    if _excess(drops, limits) > 0:
        others = list(_others(as_said, _harmed(given, as_said)))
        tried += zip(others, measure(others))
    for attempt, outcome in tried:
        if not isinstance(outcome, str) and _excess(outcome, limits) <= 0:
            return found(attempt, outcome)

    best, drops = min(((a, o) for a, o in tried if not isinstance(o, str)), key=lambda pair: _excess(pair[1], limits))
    layers = [name for name in TOOLS[config.backend].layers_of(exact) if not _is_skipped(name, best)]
    try:
        mix = mix_precision(layers, partial(_drops_with, best, drops, measure), max_drop=limits)
    except StageError as error:
        tried.append((Attempt("layer after layer in float", config), str(error)))
    else:
        attempt = _with_more_in_float(best, mix.left_in_float)
        tried.append((attempt, mix.drops))
        return found(attempt, mix.drops, mix.alone)
    if "dynamic" in TOOLS[config.backend].uncalibrated:
        dynamic = Attempt("dynamic", config, dynamic=True)
        (outcome,) = measure([dynamic])
        tried.append((dynamic, outcome))
        if not isinstance(outcome, str) and _excess(outcome, limits) <= 0:
            shop.warn("no static int8 keeps within max_drop, so the model is dynamic int8")
            return found(dynamic, outcome)
    raise StageError(_refusal(tried, limits))


def _drops_with(
    best: Attempt,
    drops: Drops,
    measure: Callable[[Sequence[Attempt]], list[Drops | str]],
    mixes: Sequence[Sequence[str]],
) -> list[Drops]:
    """The drops with these layers in float, too; those of the attempt itself are known."""
    if mixes == [[]]:
        return [drops]
    outcomes = measure([_with_more_in_float(best, names) for names in mixes])
    for outcome in outcomes:
        if isinstance(outcome, str):
            raise StageError(outcome)
    return outcomes  # type: ignore[return-value]


def _others(as_said: Attempt, harmed: Sequence[str]) -> Iterator[Attempt]:
    """What costs one more try each. Later ones have a scale for each channel, too."""
    config = as_said.config
    if not config.per_channel:
        config = config.model_copy(update={"per_channel": True})
        yield Attempt("a scale for each channel", config)
    if harmed:
        yield Attempt(f"in float: {', '.join(harmed)}", config, tuple(harmed))
    for calibration in BACKENDS[config.backend].calibrations:
        if calibration != config.calibration:
            changed = config.model_copy(update={"calibration": calibration})
            yield Attempt(f"calibration by {calibration}", changed)
            if harmed:
                yield Attempt(f"calibration by {calibration}, in float: {', '.join(harmed)}", changed, tuple(harmed))


def _with_more_in_float(base: Attempt, names: Sequence[str]) -> Attempt:
    in_float = (*base.in_float, *names)
    what = base.what if not names else f"in float: {', '.join(in_float)}"
    return Attempt(what, base.config, in_float)


def _is_skipped(name: str, attempt: Attempt) -> bool:
    return name in attempt.in_float or any(fnmatchcase(name, pattern) for pattern in attempt.config.skip)


def _harmed(given: _Given, attempt: Attempt) -> list[str]:
    """The layers whose outputs rounding harms most, where the backend's graph tells."""
    with TemporaryDirectory(prefix="heliostat-") as scratch:
        folder = _made(given, attempt, Path(scratch))
        errors = [error for error in inspect(folder, given.shop) if error.kind != "input"]
    return list(dict.fromkeys(error.layer for error in errors))


def inspect(folder: Path, shop: Workshop) -> list[RoundingError]:
    """What rounding harms badly in an artifact, the worst first; nothing for formats whose graph does not tell."""
    graph = folder / "model.onnx"
    if not graph.exists():
        return []
    return blamed(rounding_errors(graph, shop.samples("val", INSPECTED_SAMPLES), batch_size=shop.batch_size))


def _made(given: _Given, attempt: Attempt, scratch: Path) -> Path:
    exact, target = scratch / "float", scratch / "int8"
    write_files(given.files, exact)
    attempt.quantize(exact, target, given.shop, given.calibration)
    return target


def _figures(given: _Given, attempt: Attempt) -> dict[str, float] | str:
    """The figures of `val` of one attempt, or why it cannot be made."""
    with TemporaryDirectory(prefix="heliostat-") as scratch:
        try:
            folder = _made(given, attempt, Path(scratch))
        except StageError as error:
            return str(error)
        shop = given.shop
        return evaluate(load_model(folder), shop.data["val"], shop.objective, split="val", batch_size=shop.batch_size)


def _excess(drops: Drops, limits: Mapping[str, float]) -> float:
    """By how much the worst drop is beyond its limit."""
    return max(drops[metric] - limit for metric, limit in limits.items())


def _named(drops: Drops) -> dict[str, float]:
    return {f"{metric}_drop": drop for metric, drop in drops.items()}


def _row(attempt: Attempt, outcome: Drops | str, limits: Mapping[str, float]) -> dict[str, Any]:
    if isinstance(outcome, str):
        return {"tried": attempt.what, "why_not": outcome}
    return {"tried": attempt.what, **_named(outcome), "within": _excess(outcome, limits) <= 0}


def _refusal(tried: Sequence[tuple[Attempt, Drops | str]], limits: Mapping[str, float]) -> str:
    def told(outcome: Drops | str) -> str:
        if isinstance(outcome, str):
            return outcome
        return ", ".join(f"{metric} drops by {drop:.4g}" for metric, drop in outcome.items())

    asked = ", ".join(f"{metric} {limit:g}" for metric, limit in limits.items())
    lines = [f"  {attempt.what}: {told(outcome)}" for attempt, outcome in tried]
    return "\n".join([f"no mix of int8 and float keeps within max_drop ({asked}); tried:", *lines])
