"""How much memory training a model takes, before it is spread over workers.

What autograd keeps for `backward` is seen in the forward passes of a few copies of one sample, in the very rule that
trains (`torch.autograd.graph.saved_tensors_hooks`): a fixed part and one that grows with the batch. What an optimizer
keeps for each parameter is known of torch's own, and of any other seen in one step on a small parameter. All of it also
works on torch's meta device.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from heliostat.training.batches import Batch
from heliostat.training.config import OptimizerConfig
from heliostat.training.losses import LossRule
from heliostat.training.optim import build_optimizer

KEPT = {"sgd": 0, "adam": 2, "adamw": 2, "nadam": 2, "radam": 2, "rmsprop": 1, "adagrad": 1}
"""How many tensors of a parameter's size torch's optimizers keep for each, besides a momentum."""
PROBES = (2, 4)
"""The samples of the two forward passes. BatchNorm refuses to train on one."""


@dataclass(frozen=True)
class Activations:
    """The bytes that a forward pass leaves for `backward`, the batch itself with them."""

    fixed: float
    per_sample: float
    transient: float
    """What each sample adds while `backward` runs: the gradients before and behind the largest of its layers."""

    def of(self, num_samples: int) -> int:
        """For a batch of so many samples."""
        return round(self.fixed + (self.per_sample + self.transient) * num_samples)


@dataclass(frozen=True)
class Parts:
    """How far a model can be split, in bytes of its parameters. 0 is not at all."""

    largest_unit: int
    """What `fsdp` gathers at once."""
    split: int
    """What `tp` divides among its workers."""
    largest_stage: int
    """What `pp` leaves with one worker."""


@dataclass(frozen=True)
class Memory:
    """The bytes that one worker holds at once."""

    parameters: int
    gradients: int
    optimizer: int
    copies: int
    """The best epoch's weights, and the checkpoint that is being written."""
    activations: int | None
    """None where no sample of the data is known."""

    @property
    def total(self) -> int:
        """Without the activations, where they are not known."""
        return sum(value for value in asdict(self).values() if value is not None)


@dataclass(frozen=True)
class Estimate:
    """The bytes of a whole model in training, and of the activations of a batch."""

    parameters: int
    """The buffers with them."""
    trainable: int
    optimizer: int
    """What the optimizer keeps, and the averaged weights."""
    activations: Activations | None

    def replicated(self, num_samples: int, *, on_cpu: bool) -> Memory:
        """Of a worker with the whole model and so many samples at once. Copies of a state are made on CPU."""
        return Memory(
            parameters=self.parameters,
            gradients=self.trainable,
            optimizer=self.optimizer,
            copies=2 * self.parameters + self.optimizer if on_cpu else 0,
            activations=self._activations(num_samples),
        )

    def sharded(self, num_samples: int, *, workers: int, largest_unit: int) -> Memory:
        """Of one of `fsdp`'s workers: its share, and of its units two gathered and one's gradient."""
        return Memory(
            parameters=self.parameters // workers + 2 * largest_unit,
            gradients=self.trainable // workers + largest_unit,
            optimizer=self.optimizer // workers,
            copies=self.parameters // workers,
            activations=self._activations(num_samples),
        )

    def divided(self, num_samples: int, *, part: float, of_activations: float = 1.0) -> Memory:
        """Of a worker with a part of the layers, or with parts of them."""
        activations = self._activations(num_samples)
        return Memory(
            parameters=round(self.parameters * part),
            gradients=round(self.trainable * part),
            optimizer=round(self.optimizer * part),
            copies=round(self.parameters * part),
            activations=None if activations is None else round(activations * of_activations),
        )

    def _activations(self, num_samples: int) -> int | None:
        return None if self.activations is None else self.activations.of(num_samples)


def estimate(
    model: nn.Module, optimizer: OptimizerConfig, *, averaged: bool, activations: Activations | None
) -> Estimate:
    """The estimate for a model whose weights may lie anywhere, the meta device too."""
    trainable = num_bytes(parameter for parameter in model.parameters() if parameter.requires_grad)
    kept = optimizer_tensors(optimizer) + averaged
    return Estimate(
        parameters=num_bytes([*model.parameters(), *model.buffers()]),
        trainable=trainable,
        optimizer=round(trainable * kept),
        activations=activations,
    )


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of tensors, each counted once."""
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())


def optimizer_tensors(config: OptimizerConfig) -> float:
    """How many tensors of a parameter's size the optimizer keeps for each: 2 for Adam, 0 for SGD without momentum."""
    return tried_optimizer_tensors(config) if config.is_reference else KEPT[config.name] + bool(config.momentum)


def tried_optimizer_tensors(config: OptimizerConfig) -> float:
    """The same, seen in a step. The first optimizer that a process makes takes torch seconds of imports."""
    parameter = nn.Parameter(torch.zeros(64, 64))
    optimizer = build_optimizer([parameter], config)
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kept = sum(value.numel() for value in optimizer.state[parameter].values() if isinstance(value, Tensor))
    return round(kept / parameter.numel(), 2)


def activations(model: nn.Module, batch: Batch, rule: LossRule) -> Activations:
    """Measured with copies of a batch of one sample. The model, its buffers and the generators stay as they are."""
    few, many = PROBES
    with _untouched(model):
        (small, small_largest), (large, large_largest) = (
            _saved(model, _repeated(batch, number), rule) for number in PROBES
        )
    per_sample = (large - small) / (many - few)
    transient = 2 * (large_largest - small_largest) / (many - few)
    return Activations(fixed=max(0.0, small - few * per_sample), per_sample=per_sample, transient=transient)


def _repeated(batch: Batch, number: int) -> Batch:
    return tuple(torch.cat([item] * number) if isinstance(item, Tensor) else item for item in batch)


def _saved(model: nn.Module, batch: Batch, rule: LossRule) -> tuple[int, int]:
    """The bytes that a forward pass saves, the batch with them, and those of its largest tensor."""
    own = {_storage(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    found = {_storage(item): item.untyped_storage().nbytes() for item in batch if isinstance(item, Tensor)}

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            found[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = rule.loss(model, batch)  # what it saved lives as long as it does, so that no storage is there twice
    largest = max(found.values())
    del loss
    return sum(found.values()), largest


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    was_training, buffers = model.training, {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.random.fork_rng(devices=[]):
        try:
            model.train()
            yield
        finally:
            model.train(was_training)
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    buffer.copy_(buffers[name])
