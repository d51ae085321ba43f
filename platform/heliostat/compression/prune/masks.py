"""Single weights set to zero: the smallest, those that a penalty drove below a threshold, or two of every four.

The weights are those of convolutions, linear layers and the projections of attention. Biases, normalisation, embeddings
and recurrent layers are left alone, and `Masks.kept` says why.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from heliostat.compression.layers import WEIGHTED, skipped, tied_parameters
from heliostat.errors import SpecError, StageError

Scope = Literal["global", "layer"]
Sparsity = float | Mapping[str, float]
"""A fraction of all layers, or one for each of those that are named."""

UNSUITED = {
    nn.RNNBase: "recurrent weights act again at every time step, where what a zero loses adds up",
    nn.Embedding: "its rows are looked up, not multiplied, so the small ones matter as much",
}
RAMP_CUTS = 50
"""A gradual schedule ranks the weights anew at most so many times: ranking all of them takes as long as a step."""


@dataclass(frozen=True)
class Masks:
    """Which weights are pruned: for each parameter name, a boolean tensor of its shape, true where it is zero."""

    pruned: Mapping[str, Tensor]
    kept: Mapping[str, str] = field(default_factory=dict)
    """The layers with weights that were left alone, and why."""

    def apply(self, model: nn.Module) -> None:
        """Set the pruned weights of `model` to exactly zero. Call it after every optimizer step of a fine-tuning."""
        with torch.no_grad():
            for name, pruned in self.pruned.items():
                weight = model.get_parameter(name)
                weight.masked_fill_(pruned.to(weight.device), 0)

    @property
    def sparsity(self) -> float:
        """The fraction of the masked parameters' weights that is zero."""
        return sum(int(p.sum()) for p in self.pruned.values()) / sum(p.numel() for p in self.pruned.values())

    @property
    def sparsities(self) -> dict[str, float]:
        """The same for each layer."""
        return {layer_of(name): float(pruned.float().mean()) for name, pruned in self.pruned.items()}


def magnitude(model: nn.Module, *, sparsity: Sparsity, scope: Scope = "global", skip: Sequence[str] = ()) -> Masks:
    """Set the smallest weights by |w| to zero. The masks are applied to `model` at once.

    Args:
        sparsity: the fraction of the weights to set to zero, in [0, 1), or that of each layer by its name.
        scope: rank the weights of all layers together (`global`), or take the fraction from each (`layer`).
        skip: patterns (as of `fnmatch`) of names of layers to leave alone.

    Raises:
        SpecError: sparsity outside [0, 1), a pattern that matches no layer, a layer left without any weight.
        StageError: the model has no weights that can be pruned.
    """
    for fraction in sparsity.values() if isinstance(sparsity, Mapping) else [sparsity]:
        check_sparsity(fraction)
    weights, kept = prunable_weights(model, skip)
    return _applied(model, _smallest(weights, sparsity, scope), kept, cause=f"sparsity {sparsity}")


def below(model: nn.Module, *, threshold: float, skip: Sequence[str] = ()) -> Masks:
    """Set the weights with |w| < threshold to zero: what a training with an L1 penalty is followed by.

    Raises as `magnitude` does, and StageError when no weight is below.
    """
    weights, kept = prunable_weights(model, skip)
    masks = _applied(model, {n: w.abs() < threshold for n, w in weights.items()}, kept, cause=f"threshold {threshold}")
    if not masks.sparsity:
        smallest = min(float(w.abs().min()) for w in weights.values())
        raise StageError(
            f"no weight is below the threshold {threshold} (the smallest is {smallest:.2g}); "
            "a stronger or longer penalty drives more of them there"
        )
    return masks


def two_of_four(model: nn.Module, *, skip: Sequence[str] = ()) -> Masks:
    """Set the two smaller of every four weights along the input channels to zero: the 2:4 pattern.

    It is the one that sparse tensor cores run (Mishra et al. 2021, https://arxiv.org/abs/2104.08378). Layers whose
    input channels do not divide by four are left alone. Raises as `magnitude` does.
    """
    weights, kept = prunable_weights(model, skip)
    fitting = {name: w for name, w in weights.items() if w.shape[1] % 4 == 0}
    kept |= {
        layer_of(name): f"its {w.shape[1]} input channels do not divide by 4"
        for name, w in weights.items()
        if name not in fitting
    }
    if not fitting:
        raise StageError(f"no layer fits the 2:4 pattern: {_listed(kept)}")
    pruned = {}
    for name, weight in fitting.items():
        rows = weight.abs().movedim(1, -1)
        fours = rows.reshape(-1, 4)
        smaller = torch.zeros_like(fours, dtype=torch.bool)
        smaller.scatter_(1, fours.topk(2, largest=False).indices, True)
        pruned[name] = smaller.view(rows.shape).movedim(-1, 1)
    return _applied(model, pruned, kept, cause="the 2:4 pattern")


@dataclass
class Ramp:
    """Magnitude pruning while training: call it after every optimizer step.

    After step t of T the sparsity is `risen(s, t/T)`. A training that goes on from a checkpoint says so with `resume`.
    """

    sparsity: Sparsity
    num_steps: int
    scope: Scope = "global"
    skip: Sequence[str] = ()
    step: int = 0
    masks: Masks = field(default_factory=lambda: Masks({}))

    def resume(self, model: nn.Module, state: Mapping[str, Tensor], *, step: int) -> None:
        """Go on with the model's weights `state` after `step` steps: what is zero in them stays so."""
        self.step = step
        self.masks = Masks({name: state[name] == 0 for name in prunable_weights(model, self.skip)[0]})

    def __call__(self, model: nn.Module) -> None:
        self.masks.apply(model)
        self.step += 1
        every = max(1, self.num_steps // RAMP_CUTS)
        if self.step % every == 0 or self.step == self.num_steps:
            sparsity = risen(self.sparsity, self.step / self.num_steps)
            self.masks = magnitude(model, sparsity=sparsity, scope=self.scope, skip=self.skip)


def risen(sparsity: Sparsity, part: float) -> Sparsity:
    """`sparsity * (1 - (1 - part)^3)`: fast at first, while there is much to spare (Zhu and Gupta 2017,
    https://arxiv.org/abs/1710.01878). `part` of the schedule, in [0, 1], is over.
    """
    factor = 1 - (1 - part) ** 3
    if isinstance(sparsity, Mapping):
        return {layer: fraction * factor for layer, fraction in sparsity.items()}
    return sparsity * factor


def check_sparsity(sparsity: float, *, name: str = "sparsity") -> None:
    """Raise SpecError if it is not in [0, 1)."""
    if not 0 <= sparsity < 1:
        raise SpecError(f"{name} {sparsity} is not in [0, 1)")


def prunable_weights(model: nn.Module, skip: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights that can be pruned by parameter name, and the layers that keep theirs, with the reason."""
    kept = skipped(model, skip)
    shared = {name: [other for other in names if other != name] for names in tied_parameters(model) for name in names}
    weights: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        dot = f"{name}." if name else ""
        for kind, reason in UNSUITED.items():
            if isinstance(module, kind):
                kept.setdefault(name, f"{type(module).__name__}: {reason}")
        if name in kept:
            continue
        if isinstance(module, WEIGHTED):
            others = shared.get(f"{dot}weight", [])
            unsuited = [other for other in others if not isinstance(model.get_submodule(layer_of(other)), WEIGHTED)]
            if unsuited or any(other in weights for other in others):
                kept[name] = f"its weight is also {(unsuited or others)[0]!r}"
            else:
                weights[f"{dot}weight"] = module.weight.detach()
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            weights[f"{dot}in_proj_weight"] = module.in_proj_weight.detach()
    if not weights:
        raise StageError(f"there is nothing to prune: {_listed(kept) or 'no convolution, linear layer or attention'}")
    return weights, kept


def _smallest(weights: Mapping[str, Tensor], sparsity: Sparsity, scope: Scope) -> dict[str, Tensor]:
    if isinstance(sparsity, Mapping):
        fractions = {name: sparsity.get(layer_of(name), 0.0) for name in weights}
        return {name: _lowest(w.abs().flatten(), fractions[name]).view(w.shape) for name, w in weights.items()}
    if scope == "layer":
        return {name: _lowest(w.abs().flatten(), sparsity).view(w.shape) for name, w in weights.items()}
    lowest = _lowest(torch.cat([w.abs().flatten() for w in weights.values()]), sparsity)
    parts = torch.split(lowest, [w.numel() for w in weights.values()])
    return {name: part.view(w.shape) for (name, w), part in zip(weights.items(), parts)}


def _lowest(values: Tensor, fraction: float) -> Tensor:
    """A boolean vector, true for this fraction of the values: the lowest."""
    lowest = torch.zeros_like(values, dtype=torch.bool)
    lowest[torch.topk(values, round(fraction * values.numel()), largest=False).indices] = True
    return lowest


def _applied(model: nn.Module, pruned: Mapping[str, Tensor], kept: Mapping[str, str], *, cause: str) -> Masks:
    for name, mask in pruned.items():
        if mask.all():
            raise SpecError(f"{cause} leaves the layer {layer_of(name)!r} without any weight")
    masks = Masks(pruned, kept)
    masks.apply(model)
    return masks


def layer_of(parameter: str) -> str:
    """The name of the layer whose parameter it is."""
    return parameter.rpartition(".")[0]


def _listed(kept: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in kept.items())
