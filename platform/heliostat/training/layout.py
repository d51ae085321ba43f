"""The memory layout that convolutions are fastest in.

On a CPU a convolutional net trains 20 to 30 % faster with its weights in channels-last layout (measured on AVX2, widths
8 to 32); activations follow the weights by themselves. It is an optimisation that must not be seen: `view`, stride
arithmetic and code outside of torch may work in plain layout alone. So both layouts are tried on copies of the model
with a few real samples, in a training step and in evaluation. The fast one is used only if it computes the same.
Losses and metrics get contiguous outputs, and what still fails later is repeated in plain layout.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from heliostat.training.batches import Batch
from heliostat.training.config import OptimizerConfig
from heliostat.training.losses import LossRule, mean_of
from heliostat.training.optim import build_optimizer, match_layout
from heliostat.training.seeding import keep_randomness
from heliostat.training.world import World, any_worker

log = logging.getLogger(__name__)

T = TypeVar("T")

SAMPLES = 4
"""The samples that both layouts are tried on."""
OUTPUT_TOLERANCE = 1e-3
"""How much outputs in evaluation may differ: the sum of all differences, relative to the sum of all values."""
STEP_TOLERANCE = 0.1
"""The same of the loss and of the gradients of a training step, where rounding is amplified."""
TINY = 1e-6
"""What a value may differ by in any case."""


class Layout:
    """The memory layout of a model in training."""

    def __init__(self, model: nn.Module, *, world: World | None = None, is_fast: bool = False) -> None:
        self.is_fast = is_fast
        self._model = model
        self._world = world or World()
        self._hook = _enter(model) if is_fast else None
        self._parameters = list(model.parameters())
        self._buffers = list(model.buffers()) if is_fast else []
        self._kept = [buffer.clone() for buffer in self._buffers]

    def attempt(self, part: Callable[[], T], *, optimizer: torch.optim.Optimizer) -> T:
        """Return `part()`, a part of training. If it fails in the fast layout, undo it and repeat it in plain layout.

        Several workers cannot repeat a step that only one of them failed in.
        """
        if not self.is_fast or self._world.size > 1:
            return part()
        undo = self._snapshot()
        try:
            return part()
        except Exception as error:  # what fails in plain layout too is raised by the second attempt
            log.info("the channels-last layout is left: %s: %s", type(error).__name__, error)
        undo()
        self.leave()
        match_layout(optimizer)
        return part()

    def leave(self) -> None:
        """Put the model into plain layout."""
        self.is_fast = False
        if self._hook is not None:
            self._hook.remove()
        self._model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]

    @torch.no_grad()
    def _snapshot(self) -> Callable[[], None]:
        """Return a function that undoes what a part changes: buffers, gradients, and torch's random numbers.

        It is taken before every step, so the generators of Python and NumPy, which take as long as all else, are not.
        """
        random_numbers = torch.get_rng_state()
        gradients = [p.grad if p.grad is None else p.grad.clone() for p in self._parameters]
        for kept, buffer in zip(self._kept, self._buffers):
            kept.copy_(buffer)

        @torch.no_grad()
        def undo() -> None:
            torch.set_rng_state(random_numbers)
            for buffer, kept in zip(self._buffers, self._kept):
                buffer.copy_(kept)
            for parameter, gradient in zip(self._parameters, gradients):
                parameter.grad = gradient

        return undo


def choose_layout(
    model: nn.Module,
    batch: Callable[[], Batch],
    *,
    rule: LossRule,
    optimizer: OptimizerConfig,
    world: World,
) -> Layout:
    """Put a convolutional net on CPU into channels-last layout if every worker's copy computes the same in it.

    `batch` gives a few samples of the training data; it is asked only for a convolutional net.
    """
    if world.device.type != "cpu" or not any(parameter.dim() == 4 for parameter in model.parameters()):
        return Layout(model)
    differs = any_worker(not _computes_the_same(model, batch, rule, optimizer), world=world)
    return Layout(model, world=world, is_fast=not differs)


def _enter(model: nn.Module) -> RemovableHandle:
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.register_forward_hook(_plain_outputs)


def _plain_outputs(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    return tree_map(_plain, outputs)


def _plain(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) and value.layout == torch.strided else value


def _computes_the_same(
    model: nn.Module, batch: Callable[[], Batch], rule: LossRule, optimizer: OptimizerConfig
) -> bool:
    """Whether a copy of the model in channels-last layout computes what one in plain layout does."""
    restore_randomness = keep_randomness()
    try:
        rows = batch()
        plain = _try(copy.deepcopy(model), rows, rule, optimizer)
        other = copy.deepcopy(model)
        _enter(other)
        fast = _try(other, rows, rule, optimizer)
        return (
            _agree(plain.outputs, fast.outputs, OUTPUT_TOLERANCE)
            and _agree(plain.losses, fast.losses, STEP_TOLERANCE)
            and _agree_as_one(plain.gradients, fast.gradients, STEP_TOLERANCE)
        )
    except Exception as error:  # a model may raise anything; training in plain layout raises it again if it does
        log.info("the model trains in plain layout: %s: %s", type(error).__name__, error)
        return False
    finally:
        restore_randomness()


@dataclass(frozen=True)
class _Trial:
    """What a copy of a model computed. What random numbers had a part in is left out: layouts draw different ones."""

    losses: list[Tensor]
    gradients: list[Tensor]
    outputs: list[Tensor]


def _try(model: nn.Module, batch: Batch, rule: LossRule, optimizer: OptimizerConfig) -> _Trial:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.manual_seed(0)
    with _random_numbers_noted() as training_drew:
        loss = mean_of(rule.loss(model.train(), batch))
        # Not `backward`, which would also leave gradients with a loss that has parameters.
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    if optimizer.is_reference:  # torch's own optimizers work in any layout
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient if gradient is None else torch.empty_like(parameter).copy_(gradient)
        build_optimizer(parameters, optimizer).step()
    with torch.no_grad(), _random_numbers_noted() as evaluation_drew:
        outputs = [leaf for leaf in tree_leaves(model.eval()(batch[0])) if isinstance(leaf, Tensor)]
    found = [] if training_drew else [gradient.detach() for gradient in gradients if gradient is not None]
    return _Trial([] if training_drew else [loss.detach()], found, [] if evaluation_drew else outputs)


@contextmanager
def _random_numbers_noted() -> Iterator[list[bool]]:
    """Within it: a list that is not empty afterwards if torch's generator was used."""
    drew: list[bool] = []
    before = torch.get_rng_state()
    yield drew
    drew += [True] * (not torch.equal(before, torch.get_rng_state()))


def _agree(one: list[Tensor], other: list[Tensor], tolerance: float) -> bool:
    return len(one) == len(other) and all(_is_close(a, b, tolerance) for a, b in zip(one, other))


def _is_close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    return _agree_as_one([one], [other], tolerance)


def _agree_as_one(one: list[Tensor], other: list[Tensor], tolerance: float) -> bool:
    """Whether the tensors agree as if those of each list were one vector, which would take as much memory again."""
    if [tensor.shape for tensor in one] != [tensor.shape for tensor in other]:
        return False
    distance = size = 0.0
    for first, second in zip(one, other):
        first, second = first.nan_to_num(), second.nan_to_num()
        distance += float((first - second).abs().sum())
        size += float(first.abs().sum())
    return distance <= tolerance * size + TINY * sum(tensor.numel() for tensor in one)
