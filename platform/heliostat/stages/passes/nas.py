"""Architecture search by weight sharing, once for all sub-networks (Cai et al. 2020, https://arxiv.org/abs/1908.09791).

Every batch trains the largest network on the targets, and the smallest and some others on the largest one's outputs:
the sandwich rule with in-place distillation (Yu and Huang 2019, https://arxiv.org/abs/1903.05134; BigNAS, Yu et al.
2020, https://arxiv.org/abs/2003.11142). The search then takes sub-networks as they are: quality on validation side by
side, latency of some at a time with nothing else running, beside the largest one's, which makes them comparable.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from heliostat.compression.distill import distillation_loss
from heliostat.compression.measure import measure_speed
from heliostat.compression.size import num_params
from heliostat.compression.soft_loss import SoftLoss, choose_soft_loss
from heliostat.compression.subnets import forward, recalibrate, shapes_of, take_weights, why_confused, why_no_subnet
from heliostat.core.identity import canonical_json
from heliostat.core.objective import Objectives
from heliostat.core.paths import set_path
from heliostat.core.space import Space
from heliostat.core.stage import StageResult, Validated
from heliostat.errors import SpecError
from heliostat.runtime.engines import engines
from heliostat.stages.nas import NasConfig
from heliostat.stages.passes.workshop import Workshop
from heliostat.training.batches import Batch, epoch_batches, first_rows
from heliostat.training.evaluation import evaluate
from heliostat.training.lazy import materialize
from heliostat.training.seeding import seed_everything
from heliostat.training.task import build_model
from heliostat.training.trained_loss import has_parameters
from heliostat.training.world import World

AT_ONCE = 8
"""So many sub-networks are measured in one go."""
SUBNETS_KEPT = 32
"""So many modules are kept for the next batch that draws them; their weights are the supernet's."""
CALIBRATION_BATCHES = 16
SECONDS_TIMED = 0.05
"""How long each sub-network is timed."""

Point = dict[str, Any]
"""A value for each elastic argument: a sub-network."""
Row = dict[str, float]


def search_architecture(shop: Workshop, config: NasConfig, *, alone: Callable[..., Any]) -> StageResult:
    """Train, search, and save the winner. `alone(function, *args)` calls it with nothing else running beside it."""
    points = _space(config).grid()
    largest = {path: values[-1] for path, values in config.elastic.items()}
    smallest = {path: values[0] for path, values in config.elastic.items()}
    seed_everything(shop.seed)
    supernet = build_model(shop.task, _arguments(shop, largest))
    materialize(supernet, lambda: shop.samples("train", 2))
    if has_parameters(shop.objective) and not shop.loss_state:
        raise SpecError("task.loss: it has parameters, which nas does not train; fix them by requires_grad_(False)")
    _check_elastic(shop, config, supernet)
    shop = replace(shop, recipe=shop.recipe.model_copy(update={"model_args": _arguments(shop, largest)}))
    soft_loss = _soft_loss(shop, config, supernet) if config.alpha else None
    batch_loss = _sandwich(shop, config, supernet, smallest, points, soft_loss)
    fitted = shop.fine_tune(supernet, shop.recipe, batch_loss=batch_loss, phase="supernet")
    weights = {name: parameter.detach().clone() for name, parameter in supernet.named_parameters()}

    found = _search(shop, config, weights, largest, alone)
    winner = found.winner
    model = _subnet(shop, winner)
    take_weights(model, weights)
    recalibrate(model, _calibration(shop))
    recipe = shop.recipe.model_copy(update={"model_args": _arguments(shop, winner)})
    shop, metrics, history = replace(shop, recipe=recipe), dict(found.figures), list(fitted.history)
    validated = Validated(metrics)
    details: dict[str, Any] = {"winner": winner, "subnets": found.table, "best_epoch": fitted.epoch}
    details |= fitted.notes
    if soft_loss is not None:
        details["distillation"] = {"loss": soft_loss.name, "why": soft_loss.why}
    if config.finetune_epochs:
        tuning = recipe.model_copy(update={"epochs": config.finetune_epochs})
        tuned = shop.fine_tune(model, tuning, earlier=len(history))
        metrics, details["best_epoch"] = tuned.metrics, len(history) + tuned.epoch
        validated = Validated(metrics, tuned.layers)
        history += tuned.history
    files = shop.save(model.eval())
    details |= {"history": history, "parity": {"reload": shop.reload_parity(model)}}
    params = {"train": recipe.model_dump(mode="json", exclude_unset=True)}
    return StageResult(files=files, metrics=metrics, params=params, details=details, validated=validated)


# --- training -----------------------------------------------------------------------------------


def _check_elastic(shop: Workshop, config: NasConfig, supernet: nn.Module) -> None:
    """Raise SpecError for a value whose network cannot share the largest one's weights, all else as large as can be."""
    large = shapes_of(supernet)
    largest = {path: values[-1] for path, values in config.elastic.items()}
    for path, values in config.elastic.items():
        for value in values[:-1]:
            small = shapes_of(_subnet(shop, {**largest, path: value}))
            if (why := why_no_subnet(small, large) or why_confused(small, large)) is not None:
                raise SpecError(f"elastic.{path}: with {value!r} {why}")


def _soft_loss(shop: Workshop, config: NasConfig, supernet: nn.Module) -> SoftLoss:
    """How outputs are compared with the largest network's, by what it makes of the first samples."""
    inputs, targets, *_ = first_rows(shop.data["train"], shop.recipe.batch_size)
    with torch.no_grad():
        outputs = supernet.eval()(inputs)
    return choose_soft_loss(config.loss, outputs, targets, loss=shop.objective.named_loss)


def _sandwich(
    shop: Workshop,
    config: NasConfig,
    supernet: nn.Module,
    smallest: Point,
    points: Sequence[Point],
    soft_loss: SoftLoss | None,
) -> Callable[[Tensor, Batch], Tensor]:
    """The loss of a batch: of the largest network, whose outputs the loop has, the smallest, and some at random."""
    loss = shop.objective.mean_loss
    between = points[1:-1]
    large = shapes_of(supernet)

    @lru_cache(maxsize=SUBNETS_KEPT)
    def subnet_of(index: int) -> nn.Module:
        point = smallest if index < 0 else between[index]
        subnet = _subnet(shop, point)
        if (why := why_no_subnet(shapes_of(subnet), large)) is not None:
            raise SpecError(f"elastic: with {point} {why}")
        return subnet.train()

    def batch_loss(outputs: Tensor, batch: Batch) -> Tensor:
        parameters, soft = dict(supernet.named_parameters()), outputs.detach()
        drawn = random.sample(range(len(between)), k=min(config.subnets_per_batch - 2, len(between)))
        total = loss(outputs, batch[1])
        for index in [-1, *drawn]:
            student = forward(subnet_of(index), parameters, batch[0])
            if soft_loss is None:
                total = total + loss(student, batch[1])
                continue
            total = total + distillation_loss(
                student,
                soft,
                batch[1],
                loss=loss,
                soft_loss=soft_loss,
                temperature=config.temperature,
                alpha=config.alpha,
            )
        return total

    return batch_loss


def _subnet(shop: Workshop, point: Point) -> nn.Module:
    """A new network. The generators stay where they were: a training that goes on from a checkpoint builds fewer."""
    with torch.random.fork_rng(devices=[]):
        subnet = build_model(shop.task, _arguments(shop, point))
        materialize(subnet, lambda: shop.samples("train", 2))
        return subnet


def _arguments(shop: Workshop, point: Point) -> dict[str, Any]:
    arguments: dict[str, Any] = dict(shop.recipe.model_args)
    for path, value in point.items():
        arguments = set_path(arguments, path.removeprefix("model_args."), value)
    return arguments


def _calibration(shop: Workshop) -> Iterator[Tensor]:
    """Batches of training inputs, for the statistics of batch norm."""
    batches = epoch_batches(
        shop.data["train"],
        batch_size=shop.recipe.batch_size,
        seed=shop.seed,
        epoch=0,
        world=World(),
        device=torch.device("cpu"),
        min_rows=2,
    )
    return (batch[0] for _, batch in islice(batches, CALIBRATION_BATCHES))


# --- search -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    winner: Point
    figures: Row
    table: list[dict[str, Any]]
    """A row for each sub-network that was measured."""


@dataclass(frozen=True)
class _Given:
    """What every sub-network is made of."""

    shop: Workshop
    weights: Mapping[str, Tensor]


def _search(
    shop: Workshop, config: NasConfig, weights: Mapping[str, Tensor], largest: Point, alone: Callable[..., Any]
) -> _Found:
    space, objective = _space(config), shop.objective
    monitor, mode = objective.monitor(config)
    objectives = Objectives.of({monitor: mode, "latency_ms": "min"})
    every = space.size()
    name = "grid" if every is not None and every <= config.trials else "optuna_tpe"
    engine = engines()[name].make(space, num_objectives=2, seed=shop.seed, trials=config.trials)
    given, inputs = _Given(shop.portable, weights), shop.samples("val", 1)
    without_data = replace(given.shop, data={})
    reference_ms: float | None = None
    measured: dict[str, tuple[Point, Row]] = {}

    def measure(points: Sequence[Point]) -> None:
        nonlocal reference_ms
        new = {canonical_json(point): point for point in points}
        new = {key: point for key, point in new.items() if key not in measured}
        if not new:
            return
        figures = shop.side_by_side(_quality, given, list(new.values()))
        first_ms, *latencies_ms = alone(_latencies_ms, without_data, [largest, *new.values()], inputs)
        reference_ms = reference_ms or first_ms
        for (key, point), row, latency_ms in zip(new.items(), figures, latencies_ms):
            measured[key] = point, {**row, "latency_ms": latency_ms * reference_ms / first_ms}

    measure([largest])
    for start in range(0, config.trials, AT_ONCE):
        asked = {str(trial): engine.suggest(str(trial)) for trial in range(start, min(start + AT_ONCE, config.trials))}
        points = {trial: point for trial, point in asked.items() if point is not None}
        measure(list(points.values()))
        for trial, point in points.items():
            engine.observe(trial, objectives.costs(measured[canonical_json(point)][1]))
        if len(points) < len(asked):
            break

    rows = {key: row for key, (_, row) in measured.items()}
    front = set(objectives.front(rows))
    winner = _winner(rows, objectives, config, before=rows[canonical_json(largest)], better=objective.mode)
    table = [
        {**{path.removeprefix("model_args."): value for path, value in point.items()}, **row, "front": key in front}
        for key, (point, row) in measured.items()
    ]
    return _Found(measured[winner][0], rows[winner], table)


def _winner(
    rows: Mapping[str, Row], objectives: Objectives, config: NasConfig, *, before: Row, better: Callable[[str], str]
) -> str:
    """The fastest within `max_drop` of the largest network, which is within it; the best where nothing is said."""
    if not config.max_drop:
        best = objectives.best(rows)
        assert best is not None
        return best
    signs = {metric: 1 if better(metric) == "max" else -1 for metric in config.max_drop}
    within = {
        key: row
        for key, row in rows.items()
        if all(signs[m] * (before[m] - row[m]) <= limit + 1e-9 for m, limit in config.max_drop.items())
    }
    return min(within, key=lambda key: within[key]["latency_ms"])


def _space(config: NasConfig) -> Space:
    return Space.parse({path: {"grid": list(values)} for path, values in config.elastic.items()}, "elastic")


def _quality(given: _Given, point: Point) -> Row:
    """The figures of `val` of a sub-network with the weights that it shares, and its parameters."""
    shop = given.shop
    model = _subnet(shop, point)
    take_weights(model, given.weights)
    recalibrate(model, _calibration(shop))
    return {
        **evaluate(model, shop.data["val"], shop.objective, split="val", batch_size=shop.batch_size),
        "num_params": num_params(model),
    }


def _latencies_ms(shop: Workshop, points: Sequence[Point], inputs: Tensor) -> list[float]:
    """At batch 1 on one thread, all in turns; the values of the weights do not matter."""
    models = {number: (_subnet(shop, point), inputs) for number, point in enumerate(points)}
    speeds = measure_speed(models, batches=(1,), min_seconds=SECONDS_TIMED)
    return [speeds[number]["latency_ms"] for number in models]
