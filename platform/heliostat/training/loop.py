"""The one training loop. Trials, training, fine-tuning, distillation and quantization-aware training all run it.

An epoch: train on every global batch, evaluate `val`, decide whether this is the best epoch, report a row, write a
checkpoint. All randomness of an epoch comes from (seed, epoch, rank), and a checkpoint holds everything else, so an
interrupted fit goes on as if it had never stopped: bit for bit on CPU. A crash between the report and the checkpoint
reports that epoch again, with the same figures. Every worker calls the same functions with the same arguments; only
rank 0 reads and writes checkpoints.
"""

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset

from heliostat.errors import StageError
from heliostat.training.batches import Batch, Share, load_batches, training_shares
from heliostat.training.checkpoints import Checkpoints
from heliostat.training.config import TrainConfig
from heliostat.training.evaluation import evaluate
from heliostat.training.layout import use_fast_layout, use_plain_layout
from heliostat.training.optim import build_optimizer, build_scheduler
from heliostat.training.progress import Fit, OnEpoch, Progress, cpu_copy, is_better, read_on_first_worker
from heliostat.training.seeding import derive_seed, seed_everything
from heliostat.training.strategies import no_gradient_sync, parallelize, require_all_used, unwrap
from heliostat.training.task import Data, Objective
from heliostat.training.world import World, any_worker, copy_buffers_from_first, sum_over_workers

__all__ = ["Fit", "OnEpoch", "evaluate", "fit"]

log = logging.getLogger(__name__)

BatchLoss = Callable[[Tensor, Batch], Tensor]

LOSS_CHECK_STEPS = 25
"""Losses are looked at once in so many steps, which spares an accelerator a synchronisation per step."""


def fit(
    model: nn.Module,
    data: Data,
    config: TrainConfig,
    *,
    objective: Objective,
    seed: int,
    world: World | None = None,
    on_epoch: OnEpoch | None = None,
    checkpoints: Checkpoints | None = None,
    batch_loss: BatchLoss | None = None,
    after_step: Callable[[nn.Module], None] | None = None,
) -> Fit:
    """Train the model in place and return its best epoch, by `objective.monitor(config)`.

    `on_epoch(epoch, row)` is called on every worker, and ends the training by returning True on any. `batch_loss` is
    given `(outputs, batch)` and replaces the objective's loss in training only. `after_step` is given the user's own
    module after every optimizer step. With `checkpoints` the fit goes on from the newest one. Raises StageError when
    the loss stops being finite.
    """
    world = world or World()
    monitor, mode = objective.monitor(config)
    use_fast_layout(model, data["train"], world=world)
    parallel_model = parallelize(model, config.strategy, world)
    optimizer = build_optimizer(model.parameters(), config.optimizer)
    steps_per_epoch = math.ceil(len(data["train"]) / config.batch_size)  # type: ignore[arg-type]
    scheduler = build_scheduler(optimizer, config.scheduler, epochs=config.epochs, steps_per_epoch=steps_per_epoch)

    progress, best_state = Progress(), {}
    if (found := read_on_first_worker(checkpoints, world=world)) is not None:
        saved, saved_best = found
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        progress, best_state = Progress(**saved["progress"]), cpu_copy(saved_best["model"])
        log.info("training goes on after epoch %d", progress.epoch)

    while progress.epoch < config.epochs and not progress.stopped:
        epoch = progress.epoch + 1
        started = time.perf_counter()
        seed_everything(derive_seed(seed, epoch, world.rank))

        row = _train_epoch(
            parallel_model,
            data["train"],
            config,
            epoch=epoch,
            seed=seed,
            world=world,
            optimizer=optimizer,
            scheduler=scheduler,
            batch_loss=batch_loss or (lambda outputs, batch: objective.loss(outputs, batch[1])),
            after_step=after_step,
        )
        row |= evaluate(model, data["val"], objective, split="val", world=world)
        row["seconds"] = time.perf_counter() - started

        is_best = is_better(row[monitor], [past[monitor] for past in progress.history], mode)
        progress.epoch = epoch
        progress.history.append(row)
        if is_best:
            progress.best_epoch, best_state = epoch, cpu_copy(model.state_dict())
        asked_to_stop = on_epoch is not None and on_epoch(epoch, row) is True
        is_stale = 0 < config.early_stop_epochs <= epoch - progress.best_epoch
        progress.stopped = any_worker(asked_to_stop or is_stale, world=world)

        if checkpoints is not None and world.rank == 0:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "progress": vars(progress),
            }
            checkpoints.save(state, epoch=epoch, is_best=is_best)

    use_plain_layout(model)
    return progress.fit(state=best_state)


def _train_epoch(
    model: nn.Module,
    dataset: Dataset[Any],
    config: TrainConfig,
    *,
    epoch: int,
    seed: int,
    world: World,
    optimizer: torch.optim.Optimizer,
    scheduler: LambdaLR,
    batch_loss: BatchLoss,
    after_step: Callable[[nn.Module], None] | None,
) -> dict[str, float]:
    """One pass over the training data: `train_loss` (the mean over samples), the last step's `lr`, and the speed."""
    started = time.perf_counter()
    num_samples = len(dataset)  # type: ignore[arg-type]
    shares = training_shares(
        num_samples,
        batch_size=config.batch_size,
        seed=seed,
        epoch=epoch,
        world=world,
        accumulate_steps=config.accumulate_steps,
    )
    autocast = torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16")
    losses = _LossMeter(epoch=epoch, world=world)
    step, lr = 1, 0.0

    model.train()
    for share, batch in load_batches(dataset, shares, device=world.device):
        if share.ends_step:
            loss = _forward_backward(model, batch, share, batch_loss=batch_loss, autocast=autocast)
        else:
            with no_gradient_sync(model):
                loss = _forward_backward(model, batch, share, batch_loss=batch_loss, autocast=autocast)
        losses.add(loss, share, step=step)
        if not share.ends_step:
            continue

        if step == 1:
            require_all_used(model)
        if config.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        lr = float(scheduler.get_last_lr()[0])
        scheduler.step()
        if after_step is not None:
            after_step(unwrap(model))
        step += 1

    copy_buffers_from_first(unwrap(model), world=world)
    total = losses.total()
    seconds = time.perf_counter() - started
    return {"train_loss": total / num_samples, "lr": lr, "train_samples_per_s": num_samples / seconds}


def _forward_backward(
    model: nn.Module, batch: Batch, share: Share, *, batch_loss: BatchLoss, autocast: torch.autocast
) -> Tensor:
    """Add the share's part of the gradient. Returns the mean loss over the share."""
    with autocast:
        outputs = model(batch[0])
    if outputs.dtype is torch.bfloat16:
        outputs = outputs.float()
    loss = batch_loss(outputs, batch)
    (loss if share.weight == 1.0 else loss * share.weight).backward()  # type: ignore[no-untyped-call]
    return loss.detach()


class _LossMeter:
    """The sum of an epoch's losses over the samples of all workers, and the watch over them: every loss must be finite.

    The workers settle after the same steps, together, so that all of them learn of a bad loss at once: none waits in a
    collective for a peer that has given up.
    """

    def __init__(self, *, epoch: int, world: World) -> None:
        self._epoch, self._world = epoch, world
        self._pending: dict[int, Tensor] = {}
        """This worker's sum of losses of each step that is not settled yet."""
        self._sum = 0.0

    def add(self, loss: Tensor, share: Share, *, step: int) -> None:
        self._pending[step] = self._pending.get(step, 0.0) + loss.double() * share.num_samples
        if share.ends_step and len(self._pending) == LOSS_CHECK_STEPS:
            self._settle()

    def total(self) -> float:
        self._settle()
        return self._sum

    def _settle(self) -> None:
        if not self._pending:
            return
        sums = sum_over_workers(torch.stack(list(self._pending.values())), world=self._world).tolist()
        for step, loss_sum in zip(self._pending, sums):
            if not math.isfinite(loss_sum):
                raise StageError(
                    f"the training loss became {loss_sum} in epoch {self._epoch}, step {step}; "
                    "a lower optimizer.lr, scheduler.warmup_epochs or clip_grad_norm may help"
                )
            self._sum += loss_sum
        self._pending.clear()
