"""torch-pruning's dependency graph (DepGraph, Fang et al. 2023, https://arxiv.org/abs/2301.12900), made robust.

The library fails as a whole where it cannot number the channels of one layer, and some of its index lists grow without
bound. `Graph` remembers the operations that it cannot follow and raises
`UntraceableError` for the groups that pass them.
"""

from collections.abc import Sequence
from typing import Any

import torch_pruning
from torch import nn
from torch_pruning import _helpers, ops
from torch_pruning.dependency import index_mapping, shape_infer
from torch_pruning.dependency.dependency import Dependency
from torch_pruning.dependency.group import Group
from torch_pruning.pruner import function

from heliostat.compression.layers import WEIGHTED

MAX_CHANNELS = 4_000_000
"""Followed for one group, counted at each operation. The residual stream of a ResNet-152 has some 600,000."""


class UntraceableError(Exception):
    """A group whose channels the library cannot follow; the text says where."""

    def __init__(self, text: str, found: Group) -> None:
        super().__init__(text)
        self.modules = {dep.target.module for dep, _ in found.items}
        """What was found of the group before."""


class WholeGroups(function.GroupNormPruner):  # type: ignore[misc]
    """Removes the channels of a `nn.GroupNorm`: where they are whole groups, these groups go."""

    def prune_out_channels(self, layer: nn.GroupNorm, idxs: list[int]) -> nn.Module:
        size = layer.num_channels // layer.num_groups
        removed = {channel // size for channel in idxs}
        if len(removed) * size == len(set(idxs)):
            layer.num_groups -= len(removed)
        return super().prune_out_channels(layer, idxs)  # type: ignore[no-any-return]

    prune_in_channels = prune_out_channels


class Graph(torch_pruning.DependencyGraph):  # type: ignore[misc]
    """The dependency graph of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.REGISTERED_PRUNERS[ops.OPTYPE.GN] = WholeGroups()
        pruners = self.REGISTERED_PRUNERS.values()
        self._in_channel_pruning_fn = {pruner.prune_in_channels for pruner in pruners}
        self._out_channel_pruning_fn = {pruner.prune_out_channels for pruner in pruners}
        self.module2node: dict[Any, Any] = {}
        self._lost: dict[Any, str] = {}

    def build_dependency(self, *args: Any, **options: Any) -> "Graph":
        """Trace the model, as the library does, and remember the operations that lose the channels."""
        try:
            super().build_dependency(*args, **options)
        except Exception:  # the library's arithmetic fails in many ways
            if not any(node.dependencies for node in self.module2node.values()):
                raise  # the trace itself failed
            for module, node in self.module2node.items():
                try:
                    shape_infer.init_shape_information(_OneNode(self, module))
                except Exception as error:
                    self._lost[node] = f"{type(error).__name__}: {error}"
            self.refresh()
        return self

    def refresh(self) -> None:
        """Bring the numbers of channels up to date after channels were removed."""
        for module, node in self.module2node.items():
            try:
                index_mapping.update_index_mapping(_OneNode(self, module))
            except Exception as error:  # as above
                self._lost[node] = f"{type(error).__name__}: {error}"

    def get_pruning_group(self, module: nn.Module, pruning_fn: Any, idxs: Sequence[int]) -> Group:
        """Return all that goes with these channels of a layer. Raises UntraceableError where they are lost."""
        if isinstance(module, ops.TORCH_CONV) and module.groups == module.out_channels > 1:
            pruning_fn = function.prune_depthwise_conv_out_channels
        root = self.module2node[module]
        everything = Group()
        first = Dependency(pruning_fn, pruning_fn, source=root, target=root)
        everything.add_dep(first, [_helpers._HybridIndex(idx=i, root_idx=i) for i in idxs])
        stack, visited, followed = [everything.items[0]], set(), 0
        while stack:
            dep, channels = stack.pop()
            if dep.target in self._lost:
                raise UntraceableError(f"{dep.target.name}: {self._lost[dep.target]}", everything)
            visited.add(dep.target)
            for following in dep.target.dependencies:
                if not following.is_triggered_by(dep.handler):
                    continue
                mapped = channels
                for mapping in following.index_mapping:
                    mapped = mapping(mapped) if mapping is not None else mapped
                if self._is_broadcast(following, mapped):
                    continue
                if not mapped or (following.target in visited and everything.has_pruning_op(following, mapped)):
                    continue
                followed += len(mapped)
                if followed > MAX_CHANNELS:
                    raise UntraceableError(f"{following.target.name}: they are coupled without end", everything)
                everything.add_dep(following, mapped)
                stack.append(everything.items[-1])
        return self._merged(everything)

    def _is_broadcast(self, dep: Dependency, channels: Sequence[Any]) -> bool:
        """Whether the one channel of a layer, such as a spatial gate's, meets all of these."""
        layer = dep.target.module
        if not isinstance(layer, WEIGHTED) or not self.is_out_channel_pruning_fn(dep.handler):
            return False
        return self.get_pruner_of_module(layer).get_out_channels(layer) == 1 and any(c.idx for c in channels)

    def _merged(self, everything: Group) -> Group:
        group = Group()
        for dep, channels in everything.items:
            group.add_and_merge(dep, channels)
        group._DG = self
        group.met = _met(everything)
        for number in range(len(group)):
            dep, channels = group[number]
            group[number] = _helpers.GroupItem(dep, _helpers.to_plain_idxs(channels))
            group[number].root_idxs = _helpers.to_root_idxs(channels)
        return group

    def redo(self, history: Sequence[Sequence[Any]]) -> None:
        """Remove the channels that a history names: layer, whether its outputs, channels."""
        for name, is_out, channels in history:
            layer = self.model.get_submodule(name)
            pruner = self.get_pruner_of_module(layer)
            prune = pruner.prune_out_channels if is_out else pruner.prune_in_channels
            self.get_pruning_group(layer, prune, channels).prune(record_history=False)
            self.refresh()


def _met(everything: Group) -> set[tuple[int, int]]:
    """The pairs of channels of the root that meet in one channel elsewhere, as the halves of a gated unit do."""
    first: dict[tuple[int, int, int], int] = {}
    pairs = set()
    for dep, channels in everything.items:
        operation = (id(dep.target), hash(dep.handler))
        for channel in channels:
            before = first.setdefault((*operation, channel.idx), channel.root_idx)
            if before != channel.root_idx and None not in (before, channel.root_idx):
                pairs.add((before, channel.root_idx))
    return pairs


class _OneNode:
    """A graph narrowed to one of its nodes: the library's passes over all nodes stop at the first that fails."""

    def __init__(self, graph: Graph, module: Any) -> None:
        self._graph = graph
        self.module2node = {module: graph.module2node[module]}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._graph, name)
