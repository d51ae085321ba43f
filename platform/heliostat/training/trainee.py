"""All that training changes: the weights, the optimizer, the learning rate, the loss scale and the averaged weights."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from heliostat.training.batches import Batch, Share
from heliostat.training.config import TrainConfig
from heliostat.training.ema import Ema
from heliostat.training.losses import LossRule, LossSum
from heliostat.training.optim import Schedule, build_optimizer, build_schedule, match_layout
from heliostat.training.strategies import Parallel
from heliostat.training.strategies.batch_norm import synced_batch_norm
from heliostat.training.strategies.gradients import average_gradients, clip_gradients, local
from heliostat.training.strategies.parallel import Weights, copy_on_cpu
from heliostat.training.world import World


@dataclass(frozen=True)
class Trainee:
    """A model in training. Its state and a data position are all that a checkpoint needs."""

    parallel: Parallel
    rule: LossRule
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    ema: Ema | None
    syncs_batch_norm: bool = True
    loss: nn.Module | None = None
    """A loss with a state of its own, which is trained with the model."""
    loss_ema: Ema | None = None

    def backward(self, batch: Batch, share: Share) -> LossSum:
        """Add a share's part of the gradient; the share's loss."""
        world = self.parallel.data if self.syncs_batch_norm else World()
        with synced_batch_norm(world, counts=share.num_samples > 0):
            return self.parallel.backward(batch, share, self.rule)

    def step(self, *, clip_grad_norm: float | None) -> None:
        """One optimizer step, with the gradients of a whole global batch, which are cleared."""
        self.parallel.end_backward()
        if self.loss is not None:
            average_gradients(self.loss.parameters(), data=self.parallel.data)
        gradients = (local(p.grad) for p in self._parameters() if p.grad is not None)
        self.rule.end_step(gradients, world=self.parallel.data)
        scaler = self.rule.scaler
        if clip_grad_norm is not None:
            scaler.unscale_(self.optimizer)
            clip_gradients(self._parameters(), clip_grad_norm, stages=self.parallel.stages)
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step_over()

    def _parameters(self) -> Iterator[nn.Parameter]:
        yield from self.parallel.module.parameters()
        if self.loss is not None:
            yield from self.loss.parameters()

    def train(self, mode: bool = True) -> None:
        """Put the model, and a loss with a state, into training mode or into evaluation mode."""
        self.parallel.module.train(mode)
        if self.loss is not None:
            self.loss.train(mode)

    def update_averages(self) -> None:
        """Called after every optimizer step."""
        for ema in (self.ema, self.loss_ema):
            if ema is not None:
                ema.update()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the model has its averaged weights, if the config asks for them: those that count."""
        with ExitStack() as applied:
            for ema in (self.ema, self.loss_ema):
                if ema is not None:
                    applied.enter_context(ema.applied())
            yield

    def keep_loss_that_counts(self) -> dict[str, Tensor]:
        """A copy of the state of the loss that is validated; empty where it has none."""
        if self.loss is None:
            return {}
        with self.averaged():
            return copy_on_cpu(self.loss.state_dict())

    def keep_weights_that_count(self) -> Weights:
        """A copy of the state that is validated: with the averaged weights, if any, under all names of each tensor."""
        with self.averaged():
            return self.parallel.keep(self.parallel.module.state_dict())

    def state(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {
            "model": self.parallel.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.schedule.state_dict(),
            "scaler": self.rule.scaler.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else {},
            "loss": self.loss.state_dict() if self.loss is not None else {},
            "loss_ema": self.loss_ema.state_dict() if self.loss_ema is not None else {},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take up a state where it was saved."""
        self.parallel.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        match_layout(self.optimizer)
        self.schedule.load_state_dict(state["scheduler"])
        self.rule.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if self.loss is not None:
            self.loss.load_state_dict(state["loss"])
        if self.loss_ema is not None:
            self.loss_ema.load_state_dict(state["loss_ema"])


def start_training(
    parallel: Parallel,
    rule: LossRule,
    config: TrainConfig,
    *,
    steps_per_epoch: int | None,
    mode: str,
    loss: nn.Module | None = None,
) -> Trainee:
    """The model, and a loss with a state, before the first step. `mode` is the direction of the monitored figure."""
    of_loss = loss.parameters() if loss is not None else ()
    optimizer = build_optimizer([*parallel.module.parameters(), *of_loss], config.optimizer)
    schedule = build_schedule(
        optimizer, config.scheduler, epochs=config.epochs, steps_per_epoch=steps_per_epoch, mode=mode
    )
    ema = Ema(parallel.module, config.ema_decay) if config.ema_decay is not None else None
    loss_ema = Ema(loss, config.ema_decay) if config.ema_decay is not None and loss is not None else None
    return Trainee(parallel, rule, optimizer, schedule, ema, config.sync_batch_norm, loss, loss_ema)
