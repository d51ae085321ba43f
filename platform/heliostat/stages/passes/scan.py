"""The scan of a network's layers before it is pruned: each alone, at several sparsities, as tasks side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from heliostat.compression.formats import load_torch
from heliostat.compression.parametrizations import bake
from heliostat.compression.prune.heads import attention_layers
from heliostat.compression.prune.masks import layer_of, prunable_weights
from heliostat.compression.prune.sensitivity import most, spread
from heliostat.compression.prune.structured import widths
from heliostat.errors import StageError
from heliostat.stages.passes.cut import cut
from heliostat.stages.passes.workshop import Source, Workshop, files_in, write_files
from heliostat.stages.prune import PruneConfig, SensitivityConfig
from heliostat.training.evaluation import evaluate
from heliostat.training.task import Objective

AT_ONCE = 8
"""So many sparsities of the whole network are tried for the highest within `max_drop`, then so many up to the next."""

Sparsities = Mapping[str, float]
Figures = dict[str, float]


@dataclass(frozen=True)
class _Given:
    """What every try starts from."""

    shop: Workshop
    files: Mapping[str, bytes]
    """Of the model's artifact."""
    config: PruneConfig


def scan(
    shop: Workshop, source: Source, model: nn.Module, config: PruneConfig, settings: SensitivityConfig
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The sparsity of each layer, and the table of what each alone costs: `layer`, `sparsity`, the figures of `val`.

    Of an attention layer in a network that gets smaller it is heads that go, whole ones.

    Raises StageError when no layer can be pruned, or none without that `max_drop` is passed.
    """
    given = _Given(shop.portable, files_in(source.folder), config)
    objective = shop.objective
    before = evaluate(model, shop.data["val"], objective, split="val", batch_size=shop.batch_size)
    sizes, pieces = _sizes(shop, model, config)
    levels = {layer: _possible(settings.levels, count) for layer, count in pieces.items()}
    layers = [name for name, _ in model.named_modules() if levels.get(name)]
    if not layers:
        asked = list(settings.levels)
        raise StageError(f"sensitivity: no layer has weights, channels or heads enough for the levels {asked}")
    tries = [[{layer: level} for level in levels[layer]] for layer in layers]
    figures = shop.side_by_side(_pruned_figures, given, tries)
    table = [
        {"layer": layer, "sparsity": level, **row}
        for layer, rows in zip(layers, figures)
        for level, row in zip(levels[layer], rows)
    ]
    harms = {
        layer: [(level, row["val_loss"] - before["val_loss"]) for level, row in zip(levels[layer], rows)]
        for layer, rows in zip(layers, figures)
    }
    if not settings.max_drop:
        return spread(harms, sizes, config.sparsity), table

    def excess(row: Figures) -> float:
        drops = _drops(before, row, settings.max_drop, objective)
        return max(drops[metric] - limit for metric, limit in settings.max_drop.items())

    low, step = 0.0, most(harms, sizes) / AT_ONCE
    for _ in range(2):
        totals = [low + step * number for number in range(1, AT_ONCE + 1)]
        rows = shop.side_by_side(_pruned_figures, given, [[spread(harms, sizes, total)] for total in totals])
        within = [excess(row) <= 0 for (row,) in rows]
        low += step * (within.index(False) if False in within else AT_ONCE)
        if False not in within:
            break
        step /= AT_ONCE
    found = spread(harms, sizes, low)
    if not any(round(pieces[layer] * sparsity) for layer, sparsity in found.items()):
        limits = ", ".join(f"{metric} {limit:g}" for metric, limit in settings.max_drop.items())
        raise StageError(f"sensitivity: nothing can be pruned within max_drop ({limits}) before fine-tuning")
    return found, table


def _sizes(shop: Workshop, model: nn.Module, config: PruneConfig) -> tuple[dict[str, int], dict[str, int]]:
    """Of each layer that can be pruned its weights or channels, those of all heads for attention, and in how many
    pieces they go.
    """
    if config.method == "magnitude":
        weights = {layer_of(name): weight.numel() for name, weight in prunable_weights(model, config.skip)[0].items()}
        return weights, weights
    channels = widths(model, example=shop.proof, importance=config.importance, skip=config.skip)
    attention = attention_layers(model, config.skip)
    inner = {name: layer.num_heads * layer.head_dim for name, layer in attention.items()}
    return channels | inner, channels | {name: layer.num_heads for name, layer in attention.items()}


def _possible(levels: Sequence[float], pieces: int) -> list[float]:
    """Those that take something from a layer of so many pieces, and not all of it."""
    return [level for level in levels if 0 < round(level * pieces) < pieces]


def _drops(before: Figures, after: Figures, metrics: Mapping[str, float], objective: Objective) -> Figures:
    return {
        metric: (before[metric] - after[metric]) * (1 if objective.mode(metric) == "max" else -1) for metric in metrics
    }


def _pruned_figures(given: _Given, tries: Sequence[Sparsities]) -> list[Figures]:
    """The figures of `val` of the model after each of these cuts, which start from the same model."""
    shop, config = given.shop, given.config
    objective = shop.objective
    figures = []
    with TemporaryDirectory(prefix="heliostat-") as folder:
        write_files(given.files, Path(folder))
        for sparsities in tries:
            model = load_torch(Path(folder))
            bake(model)
            model, _, _ = cut(shop, model, config, sparsities)
            figures.append(evaluate(model, shop.data["val"], objective, split="val", batch_size=shop.batch_size))
    return figures
