"""What can be cut of a network: its groups of channels, what each is worth, and which of them prove to be cuttable.

Each cut is tried as a whole first. Where it is not the masked network, halves of it are tried, until the groups that
are to blame are found; those are left alone. The importance of a channel is torch-pruning's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch_pruning
from torch import Tensor, nn

from heliostat.compression.layers import skipped
from heliostat.compression.parametrizations import copied
from heliostat.compression.proof import CHECKED_ROWS, find_sound
from heliostat.compression.prune.coupling import Coupling, couplings
from heliostat.compression.prune.dependency import Graph
from heliostat.compression.prune.graph import Channels, dependencies, ready_to_trace, trains_more
from heliostat.compression.prune.masked import proven_cut
from heliostat.compression.prune.steps import step_of

Score = Literal["magnitude", "taylor", "bn_scale", "size"]
"""An importance, or the root mean square of a channel's weights."""
Backward = Callable[[nn.Module], None]
Units = Mapping[str, Sequence[int]]
"""By layer, the numbers of the units that go."""
Choice = Callable[[Sequence[str]], Units]
"""Says what goes of the groups of these layers, when no others are cut."""

IMPORTANCES: dict[str, Callable[[], Callable[[Any], Tensor | None]]] = {
    "magnitude": lambda: torch_pruning.importance.GroupMagnitudeImportance(p=2),
    "taylor": torch_pruning.importance.GroupTaylorImportance,
    "bn_scale": torch_pruning.importance.BNScaleImportance,
}


@dataclass
class Plan:
    """The groups of one model, and the layers that keep their width."""

    model: nn.Module
    rows: Tensor
    """Of real data: cuts are proven on them."""
    training: bool
    """Whether the graph is that of the forward in training mode."""
    graph: Graph
    groups: dict[str, Coupling]
    kept: dict[str, str]
    """By layer, why it keeps its width."""
    scores: dict[str, Tensor] = field(default_factory=dict)
    """By layer, what each unit of its group is worth. Only groups with scores are cut."""

    @classmethod
    def of(cls, model: nn.Module, example: Tensor, kept: Mapping[str, str]) -> "Plan":
        """Trace a copy of the model on the first row of `example`; the layers in `kept` are left alone."""
        model = copied(model)
        training = trains_more(model, example[:1])
        with ready_to_trace(model):
            graph = dependencies(model, example[:1], training=training)
            groups, reasons = couplings(graph, kept)
        return cls(model, example[:CHECKED_ROWS], training, graph, groups, reasons)

    def score(self, by: Score, backward: Backward | None = None) -> None:
        """Find what each unit is worth; the groups that have no such score are left alone."""
        if backward is not None:
            with ready_to_trace(self.model):
                backward(self.model)
        for name, coupling in list(self.groups.items()):
            try:
                found = [self._score(by, part) for part in (coupling, *coupling.alike)]
            except Exception as error:  # the library's arithmetic fails in many ways
                self._keep(name, f"torch-pruning cannot follow its channels: {type(error).__name__}: {error}")
                continue
            scores = [score for score in found if score is not None]
            if not scores:
                self._keep(name, "no batch norm scales its channels")
                continue
            units = torch.tensor(coupling.units)
            self.scores[name] = torch.stack(scores).mean(0)[units].mean(1)
        self.model.zero_grad(set_to_none=True)

    def cut(self, choose: Choice) -> tuple[nn.Module, dict[str, Any]]:
        """Return the model without what is chosen of the groups for which that is the masked network, and the step.

        Groups under a norm over all of their channels are cut only if no other can be.
        """
        exact = [name for name in self.scores if not self.groups[name].norms]
        others = [name for name in self.scores if self.groups[name].norms]
        found = self._proven(exact, choose)
        if found.names or not others:
            for name in others:
                norm = self.groups[name].norms[0]
                kind = type(self.model.get_submodule(norm)).__name__
                self._keep(name, f"{norm!r} ({kind}) normalises over its channels: fewer are not the masked network")
        else:
            found = self._proven(others, choose)
        norms = {norm: _approximate(self.model, norm) for name in found.names for norm in self.groups[name].norms}
        step = {**found.step, "kept": self.kept, **({"approximate": norms} if norms else {})}
        return found.model, step

    def _score(self, by: Score, coupling: Coupling) -> Tensor | None:
        if by == "size":
            return Channels(self.graph, coupling.group).rms()[0].detach()
        values = IMPORTANCES[by]()(coupling.group)
        return None if values is None else values.cpu()

    def _keep(self, name: str, reason: str) -> None:
        self.kept |= dict.fromkeys(self.groups[name].members, reason)
        self.groups.pop(name)
        self.scores.pop(name, None)

    def _proven(self, names: Sequence[str], choose: Choice) -> "_Proven":
        """Cut the groups one half after the other, and leave those alone without which the rest is proven."""
        proven = _Proven([], copied(self.model), step_of(self.model, self.rows, [], training=self.training))

        def try_(some: list[str]) -> str | None:
            nonlocal proven
            tried, reason = self._tried(some, choose)
            proven = tried if reason is None else proven
            return reason

        _, reasons = find_sound(names, try_)
        for name, reason in reasons.items():
            self._keep(name, reason)
        return proven

    def _tried(self, names: list[str], choose: Choice) -> "tuple[_Proven, str | None]":
        removed = {name: self.groups[name].channels(units) for name, units in choose(names).items()}
        channels = [(layer, removed[name]) for name in removed for layer in self.groups[name].layers]
        norms = [norm for name in removed for norm in self.groups[name].norms]
        step = step_of(self.model, self.rows, channels, training=self.training)
        if not channels:
            return _Proven(names, copied(self.model), step), None
        model, reason = proven_cut(self.model, step, self.rows, norms=norms)
        return _Proven(names, model, step), reason


@dataclass(frozen=True)
class _Proven:
    names: list[str]
    model: nn.Module
    step: dict[str, Any]


def cuttable(
    model: nn.Module, *, example: Tensor, score: Score = "magnitude", skip: Sequence[str] = ()
) -> dict[str, Coupling]:
    """Return the groups that can be cut, by layer: the model without the strongest unit of each is the masked one.

    Raises SpecError for a pattern of `skip` that matches no layer.
    """
    plan = Plan.of(model, example, skipped(model, skip))
    plan.score(score)
    _, step = plan.cut(lambda names: {name: [int(plan.scores[name].argmax())] for name in names})
    found = {name for name, _, _ in step["groups"]}
    return {name: group for name, group in plan.groups.items() if name in found}


def _approximate(model: nn.Module, norm: str) -> str:
    kind = type(model.get_submodule(norm)).__name__
    return f"{kind}: its statistics are those of the remaining channels, while a masked network counts the zeros too"
