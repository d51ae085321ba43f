"""How a batch's loss comes about, in which precision, and the watch over it.

A loss is the mean over the samples of a batch, or a pair `(sum, weight)`: what is minimised is then the sum over the
global batch divided by its weight, however the batch is cut into parts and shared among workers. The gradients of the
sums are accumulated, and divided before the step by the weight of all.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from heliostat.errors import StageError
from heliostat.training.batches import Batch, Share
from heliostat.training.structure import require_loss, require_outputs
from heliostat.training.world import World, sum_over_workers

Loss = Tensor | tuple[Tensor, Tensor | float]
"""The mean over the samples, or the sum and what it is divided by."""
BatchLoss = Callable[[Any, Batch], Loss]
TrainStep = Callable[[nn.Module, Batch], Loss]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LOSS_CHECK_STEPS = 25
"""Losses are looked at once in so many steps, which spares an accelerator a synchronisation per step."""


class LossSum(NamedTuple):
    """A loss to be added up: the sum over some samples, and their weight, both without gradient, as float64."""

    total: Tensor
    weight: Tensor


def summed(loss: Loss, num_samples: int) -> LossSum:
    """Return the loss of a batch, of which `num_samples` count, as sum and weight. Raises StageError for no loss."""
    total, weight = _pair(loss) if not isinstance(loss, Tensor) else (_scalar(loss) * num_samples, num_samples)
    weight = torch.as_tensor(weight, dtype=torch.float64, device=total.device).detach()
    return LossSum(total.detach().double().reshape(()), weight.reshape(()))


def mean_of(loss: Loss) -> Tensor:
    """The loss of a batch as one number, with its gradient; 0 where nothing in the batch has a weight."""
    if isinstance(loss, Tensor):
        return _scalar(loss)
    total, weight = _pair(loss)
    weight = torch.as_tensor(weight, dtype=total.dtype, device=total.device).detach()
    return total / torch.where(weight == 0, 1, weight)


def plus(loss: Loss, term: Tensor) -> Loss:
    """The loss of a batch with a term that does not depend on the batch."""
    if isinstance(loss, Tensor):
        return loss + term
    total, weight = _pair(loss)
    return total + term * weight, weight


def _scalar(loss: Tensor) -> Tensor:
    if loss.numel() != 1:
        raise StageError(f"the loss has the shape {tuple(loss.shape)}; return one number, or (sum, weight)")
    return loss.reshape(())


def _pair(loss: Any) -> tuple[Tensor, Tensor | float]:
    if not isinstance(loss, tuple | list) or len(loss) != 2 or not isinstance(loss[0], Tensor):
        raise StageError(f"the loss is a {type(loss).__name__}; return a tensor, or a pair of tensors (sum, weight)")
    return _scalar(loss[0]), loss[1]


class LossRule:
    """The loss of a batch: `batch_loss(outputs, batch)`, or whatever the user's own `train_step(model, batch)` says.

    Forward passes run in the precision. With fp16 the loss is scaled before `backward`, so that small gradients do not
    vanish, and steps whose gradients overflowed are left out (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740).
    """

    def __init__(
        self, batch_loss: BatchLoss, *, precision: str, device: torch.device, train_step: TrainStep | None = None
    ) -> None:
        self.batch_loss = batch_loss
        self._train_step = train_step
        self._precision = precision
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.autocast = torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32")
        self._weighed: Tensor | None = None
        """The weight of this worker's shares of a global batch, and their samples, where gradients are of sums."""

    def on(self, device: torch.device) -> "LossRule":
        """The same rule on another device."""
        return LossRule(self.batch_loss, precision=self._precision, device=device, train_step=self._train_step)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """The loss of a batch."""
        with self.autocast:
            if self._train_step is not None:
                loss = self._train_step(model, batch)
                require_loss(loss, place="task.train_step")
                return loss
            outputs = model(batch[0])
        require_outputs(outputs, batch[0])
        loss = self.batch_loss(in_full_precision(outputs), batch)
        require_loss(loss)
        return loss

    def backward(self, loss: Loss, share: Share) -> LossSum:
        """Add a share's part of the gradient, scaled where the precision needs it; the loss, to be added up."""
        part = mean_of(loss) if share.is_whole else self.part_of_mean(loss, share, share.num_samples)
        self.scaler.scale(part).backward()  # type: ignore[no-untyped-call]
        found = summed(loss, share.num_samples)
        if not share.num_samples:
            found = LossSum(torch.zeros_like(found.total), torch.zeros_like(found.weight))
        if not share.is_whole:
            self.weigh(found, share, is_sum=not isinstance(loss, Tensor))
        return found

    def part_of_mean(self, loss: Loss, share: Share, num_samples: int) -> Tensor:
        """Return what `num_samples` of a share add to the loss of the global batch, averaged over workers.

        A sum is divided by the number of samples, which is known, until `end_step` knows the weight.
        """
        mean, factor = isinstance(loss, Tensor), share.weight / max(1, share.num_samples)
        factor *= num_samples if mean else bool(num_samples)
        total = _scalar(loss) if isinstance(loss, Tensor) else _pair(loss)[0]
        return total if factor == 1.0 else total * factor

    def weigh(self, found: LossSum, share: Share, *, is_sum: bool) -> None:
        """Note what the gradients of a share's sum have to be divided by."""
        if is_sum:
            weighed = torch.stack([found.weight, found.weight.new_tensor(share.num_samples)])
            self._weighed = weighed if self._weighed is None else self._weighed + weighed

    def end_step(self, gradients: Iterable[Tensor], *, world: World) -> None:
        """Divide the gradients of a whole global batch by its weight. `world` are the workers that share it."""
        if self._weighed is None:
            return
        weight, num_samples = sum_over_workers(self._weighed, world=world)
        self._weighed = None
        factor = torch.where(weight == 0, 0, num_samples / weight)
        for gradient in gradients:
            gradient.mul_(factor)


def in_full_precision(outputs: Any) -> Any:
    """A half-precision tensor as fp32, since losses and metrics are computed in that; anything else as it is."""
    is_half = isinstance(outputs, Tensor) and outputs.dtype in (torch.bfloat16, torch.float16)
    return outputs.float() if is_half else outputs


class LossMeter:
    """The sum of an epoch's losses over all workers, and the watch over them: every loss must be finite.

    The workers settle after the same steps, together, so that all of them learn of a bad loss at once: none waits in a
    collective for a peer that has given up.
    """

    def __init__(self, *, epoch: int, world: World) -> None:
        self._epoch, self._world = epoch, world
        self._pending: dict[int, Tensor] = {}
        """This worker's sum of losses, their weight, and the samples of each step that is not settled yet."""
        self._sum = self._weight = 0.0
        self._num_samples = 0

    def add(self, loss: LossSum, share: Share, *, step: int) -> None:
        row = torch.stack([loss.total, loss.weight, loss.weight.new_tensor(share.num_samples)])
        self._pending[step] = self._pending.get(step, 0.0) + row
        if share.ends_step and len(self._pending) == LOSS_CHECK_STEPS:
            self._settle()

    def mean(self) -> tuple[float, int]:
        """The loss over the epoch, and the samples. Raises StageError for an epoch without anything that counts."""
        self._settle()
        if not self._num_samples:
            raise StageError("the training data gave no sample; a stream must start anew each time it is iterated over")
        if not self._weight:
            raise StageError("the loss of every training sample has the weight 0; all its targets may be ignored")
        return self._sum / self._weight, self._num_samples

    def _settle(self) -> None:
        if not self._pending:
            return
        rows = sum_over_workers(torch.stack(list(self._pending.values())), world=self._world).tolist()
        for step, (loss_sum, weight, num_samples) in zip(self._pending, rows):
            if not math.isfinite(loss_sum) or not math.isfinite(weight):
                raise StageError(
                    f"the training loss became {loss_sum} in epoch {self._epoch}, step {step}; "
                    "a lower optimizer.lr, scheduler.warmup_epochs or clip_grad_norm may help"
                )
            self._sum += loss_sum
            self._weight += weight
            self._num_samples += int(num_samples)
        self._pending.clear()
