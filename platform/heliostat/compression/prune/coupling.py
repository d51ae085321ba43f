"""Which channels of a network go together, and in what units, before any of them is chosen.

A group is all that has to go when a channel of one layer goes. Its unit is the smallest set of channels whose removal
leaves every layer with the computation of a masked network: one channel, a whole group of a group norm, or the same
channel of each group of a grouped convolution. Two groups that a tied weight holds together are cut alike, as one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from torch import nn

from heliostat.compression.layers import WEIGHTED, tied_parameters
from heliostat.compression.prune.dependency import Graph, UntraceableError

PRUNABLE = (*WEIGHTED, nn.Embedding)
"""Layers whose width can change."""
FIXED_WIDTH = (nn.RNNBase, nn.MultiheadAttention)
"""Layers that keep their width, as do the neighbours on whose width theirs depends."""


@dataclass(frozen=True)
class Coupling:
    """Channels that go together, by the layer that numbers them."""

    layer: str
    group: Any
    """torch-pruning's, of all channels."""
    members: tuple[str, ...]
    """The layers whose width is that of the group."""
    units: tuple[tuple[int, ...], ...]
    """All of one size, in the order of their first channel."""
    norms: tuple[str, ...] = ()
    """The layers that normalise over all channels: over fewer, their statistics are not those of a masked network."""
    alike: tuple["Coupling", ...] = ()
    """The groups that lose the same channels, since a weight in them is tied to one in this group."""

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that number the channels: this group's, and those of the groups that are cut alike."""
        return self.layer, *(other.layer for other in self.alike)

    @property
    def unit_size(self) -> int:
        """How many channels go at a time."""
        return len(self.units[0])

    def channels(self, units: Iterable[int]) -> list[int]:
        """Return the channels of some units, rising."""
        return sorted(channel for unit in units for channel in self.units[unit])


def couplings(graph: Graph, skip: Mapping[str, str]) -> tuple[dict[str, Coupling], dict[str, str]]:
    """Return the groups that may be cut, by layer, and every other layer with the reason why it keeps its width."""
    names = {module: name for name, module in graph.model.named_modules()}
    kept = {
        name: f"{type(module).__name__}: its forward relies on its width"
        for module, name in names.items()
        if isinstance(module, FIXED_WIDTH)
    }
    found: dict[str, Coupling] = {}
    seen: set[str] = set()
    for layer in list(graph.module2node):
        if not isinstance(layer, PRUNABLE) or names[layer] in seen or layer in graph.IGNORED_LAYERS_IN_TRACING:
            continue
        if graph.get_pruner_of_module(layer).get_out_channels(layer) == 1:
            kept[names[layer]] = "it has one channel"
            continue
        try:
            coupling, reason = _coupling(graph, layer, names)
        except UntraceableError as error:
            lost = [names[module] for module in error.modules if isinstance(module, PRUNABLE)]
            kept |= dict.fromkeys(lost, f"torch-pruning cannot follow its channels: {error}")
            seen.update(lost)
            continue
        except Exception as error:  # the library's arithmetic fails in many ways
            kept[names[layer]] = f"torch-pruning cannot follow its channels: {type(error).__name__}: {error}"
            continue
        seen.update(coupling.members)
        skipped = next((skip[name] for name in coupling.members if name in skip), None)
        if reason or skipped:
            kept |= dict.fromkeys(coupling.members, reason or f"a layer that it is coupled with {skipped}")
        else:
            found[coupling.layer] = coupling
    return _tied(graph, found), kept | dict(skip)


def _coupling(graph: Graph, layer: nn.Module, names: Mapping[nn.Module, str]) -> tuple[Coupling, str | None]:
    """The group of a layer's channels, and why none of them can go."""
    pruner = graph.get_pruner_of_module(layer)
    num_channels = pruner.get_out_channels(layer)
    group = graph.get_pruning_group(layer, pruner.prune_out_channels, list(range(num_channels)))
    nodes = [dep.target for dep, _ in group if graph.is_out_channel_pruning_fn(dep.handler)]
    members = tuple(names[node.module] for node in nodes if isinstance(node.module, PRUNABLE))
    norms = tuple(names[dep.target.module] for dep, _ in group if _normalises_over_all(dep.target.module))
    bare = Coupling(names[layer], group, members, (), tuple(dict.fromkeys(norms)))
    if any(not node.outputs for node in nodes):
        return bare, "it gives the model's output"
    if fixed := [dep.target.module for dep, _ in group if isinstance(dep.target.module, FIXED_WIDTH)]:
        return bare, f"its width is coupled with that of {names[fixed[0]]!r} ({type(fixed[0]).__name__})"
    for dep, channels in group:
        width = (graph.get_out_channels if graph.is_out_channel_pruning_fn(dep.handler) else graph.get_in_channels)(
            dep.target
        )
        if width is not None and not 0 <= min(channels) <= max(channels) < width:
            return bare, f"torch-pruning cannot follow its channels into {dep.target.name}"
    units = _units(graph, group, num_channels)
    if isinstance(units, str):
        return bare, units
    if len(units) < 2:
        return bare, "its channels can only go all together"
    return replace(bare, units=units), None


def _normalises_over_all(layer: Any) -> bool:
    return isinstance(layer, nn.LayerNorm) or (isinstance(layer, nn.GroupNorm) and layer.num_groups == 1)


def _goes_in_sets(layer: Any) -> bool:
    if isinstance(layer, nn.GroupNorm):
        return 1 < layer.num_groups < layer.num_channels
    return isinstance(layer, nn.modules.conv._ConvNd) and 1 < layer.groups != layer.out_channels


def _units(graph: Graph, group: Any, num_channels: int) -> tuple[tuple[int, ...], ...] | str:
    """The sets of channels that go at a time, or why there are none."""
    if not group.met and not any(_goes_in_sets(item.dep.target.module) for item in group):
        return tuple((channel,) for channel in range(num_channels))
    leader = list(range(num_channels))

    def first_of(channel: int) -> int:
        while leader[channel] != channel:
            channel = leader[channel]
        return channel

    def join(one: int, other: int) -> None:
        leader[max(first_of(one), first_of(other))] = min(first_of(one), first_of(other))

    for pair in group.met:
        join(*pair)
    for item in group:
        layer = item.dep.target.module
        if not _goes_in_sets(layer):
            continue
        if isinstance(layer, nn.GroupNorm):
            size = layer.num_channels // layer.num_groups
            key = [channel // size for channel in item.idxs]
            if len(key) != len(set(key)) * size:
                return f"it has only a part of the channels of a group of {item.dep.target.name!r} (GroupNorm)"
        else:
            is_out = graph.is_out_channel_pruning_fn(item.dep.handler)
            size = (layer.out_channels if is_out else layer.in_channels) // layer.groups
            key = [channel % size for channel in item.idxs]
        if None in item.root_idxs:
            return f"torch-pruning cannot follow its channels into {item.dep.target.name}"
        for (one, other), (a, b) in zip(pairwise(_sorted_by(key, item.root_idxs)), pairwise(sorted(key))):
            if a == b:
                join(one, other)
    sets: dict[int, list[int]] = {}
    for channel in range(num_channels):
        sets.setdefault(first_of(channel), []).append(channel)
    if len({len(unit) for unit in sets.values()}) > 1:
        return "its channels go in sets of different sizes"
    return tuple(map(tuple, sets.values()))


def _sorted_by(key: Sequence[int], values: Sequence[int]) -> list[int]:
    return [value for _, value in sorted(zip(key, values))]


# --- tied weights ---------------------------------------------------------------------------------------------------


def _tied(graph: Graph, found: Mapping[str, Coupling]) -> dict[str, Coupling]:
    """The groups, of which those are one that cut the same dimension of a tied weight at the same channels."""
    touched = {name: _dimensions(graph, coupling) for name, coupling in found.items()}
    merged = dict(found)
    for names in tied_parameters(graph.model):
        for dim in (0, 1):
            sides = {(name, dim) for name in names}
            together = [name for name in merged if sides & touched[name]]
            for first, other in zip(together[:1] * len(together), together[1:]):
                if merged[other].units == merged[first].units:
                    one, two = merged[first], merged.pop(other)
                    both = (*one.alike, replace(two, alike=()), *two.alike)
                    norms = tuple(dict.fromkeys(one.norms + two.norms))
                    merged[first] = replace(one, members=one.members + two.members, norms=norms, alike=both)
                    touched[first] |= touched[other]
    return merged


def _dimensions(graph: Graph, coupling: Coupling) -> set[tuple[str, int]]:
    """The weights, each with its dimension, that are cut at the channels as the group numbers them."""
    names = {module: name for name, module in graph.model.named_modules()}
    found = set()
    for item in coupling.group:
        layer = item.dep.target.module
        if isinstance(layer, PRUNABLE) and item.idxs == item.root_idxs:
            is_out = graph.is_out_channel_pruning_fn(item.dep.handler)
            by_column = isinstance(layer, nn.Embedding) or getattr(layer, "transposed", False)
            found.add((f"{names[layer]}.weight" if names[layer] else "weight", int(is_out == by_column)))
    return found
