"""How a batch's loss comes about, in which precision, and the watch over it."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from heliostat.errors import StageError
from heliostat.training.batches import Batch, Share
from heliostat.training.world import World, sum_over_workers

BatchLoss = Callable[[Tensor, Batch], Tensor]
TrainStep = Callable[[nn.Module, Batch], Tensor]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LOSS_CHECK_STEPS = 25
"""Losses are looked at once in so many steps, which spares an accelerator a synchronisation per step."""


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

    def on(self, device: torch.device) -> "LossRule":
        """The same rule on another device."""
        return LossRule(self.batch_loss, precision=self._precision, device=device, train_step=self._train_step)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a batch."""
        with self.autocast:
            if self._train_step is not None:
                return self._train_step(model, batch)
            outputs = model(batch[0])
        return self.batch_loss(in_full_precision(outputs), batch)

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradients, scaled where the precision needs it."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]


def in_full_precision(outputs: Any) -> Any:
    """A half-precision tensor as fp32, since losses and metrics are computed in that; anything else as it is."""
    is_half = isinstance(outputs, Tensor) and outputs.dtype in (torch.bfloat16, torch.float16)
    return outputs.float() if is_half else outputs


class LossMeter:
    """The sum of an epoch's losses over the samples of all workers, and the watch over them: every loss must be finite.

    The workers settle after the same steps, together, so that all of them learn of a bad loss at once: none waits in a
    collective for a peer that has given up.
    """

    def __init__(self, *, epoch: int, world: World) -> None:
        self._epoch, self._world = epoch, world
        self._pending: dict[int, Tensor] = {}
        """This worker's sum of losses, and number of samples, of each step that is not settled yet."""
        self._sum = 0.0
        self._num_samples = 0

    def add(self, loss: Tensor, share: Share, *, step: int) -> None:
        row = torch.stack([loss.double() * share.num_samples, loss.new_tensor(share.num_samples, dtype=torch.float64)])
        self._pending[step] = self._pending.get(step, 0.0) + row
        if share.ends_step and len(self._pending) == LOSS_CHECK_STEPS:
            self._settle()

    def mean(self) -> tuple[float, int]:
        """The mean over the epoch's samples, and their number. Raises StageError for an epoch without any."""
        self._settle()
        if not self._num_samples:
            raise StageError("the training data gave no sample; a stream must start anew each time it is iterated over")
        return self._sum / self._num_samples, self._num_samples

    def _settle(self) -> None:
        if not self._pending:
            return
        rows = sum_over_workers(torch.stack(list(self._pending.values())), world=self._world).tolist()
        for step, (loss_sum, num_samples) in zip(self._pending, rows):
            if not math.isfinite(loss_sum):
                raise StageError(
                    f"the training loss became {loss_sum} in epoch {self._epoch}, step {step}; "
                    "a lower optimizer.lr, scheduler.warmup_epochs or clip_grad_norm may help"
                )
            self._sum += loss_sum
            self._num_samples += int(num_samples)
        self._pending.clear()
