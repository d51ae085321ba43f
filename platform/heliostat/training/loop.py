"""The one training loop. Trials, training, fine-tuning, distillation and quantization-aware training all run it.

An epoch: train on every global batch, evaluate `val`, decide whether this is the best epoch, report a row, write a
checkpoint. All randomness of an epoch comes from (seed, epoch, rank), and a checkpoint holds everything else, so an
interrupted fit goes on as if it had never stopped: bit for bit on CPU. A crash between the report and the checkpoint
reports that epoch again, with the same figures. Every worker calls the same functions with the same arguments;
rank 0 reads and writes checkpoints, or each its own part of them where the model is spread over workers.
"""

import time
from collections.abc import Callable, Generator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from heliostat.training.batches import Batch, epoch_batches, first_rows, first_sample, num_steps
from heliostat.training.checkpoints import Checkpoints
from heliostat.training.config import TrainConfig
from heliostat.training.evaluation import evaluate
from heliostat.training.first_batch import check_outputs, check_samples
from heliostat.training.layout import SAMPLES, Layout, choose_layout
from heliostat.training.lazy import materialize
from heliostat.training.leftover import find_min_rows
from heliostat.training.losses import BatchLoss, LossMeter, LossRule, in_full_precision
from heliostat.training.marks import Marks, marking
from heliostat.training.phases import Phases
from heliostat.training.progress import Fit, OnBest, OnEpoch, Progress, is_better
from heliostat.training.resume import put_down, take_up
from heliostat.training.seeding import derive_seed, deterministic_algorithms, seed_everything
from heliostat.training.split_loss import notes_on_split_loss
from heliostat.training.strategies import parallelize
from heliostat.training.strategies.auto import choose_strategy
from heliostat.training.strategies.parallel import copy_on_cpu
from heliostat.training.task import Data, Objective
from heliostat.training.trained_loss import refuse_hidden_parameters, trained_loss
from heliostat.training.trainee import Trainee, start_training
from heliostat.training.weights import require_plain_state
from heliostat.training.world import World, any_worker, copy_buffers_from_first

__all__ = ["Epochs", "Fit", "OnEpoch", "evaluate", "fit", "train_epochs"]

Epochs = Generator[tuple[int, dict[str, float]], bool | None, Fit]
"""A training that stops after each epoch, gives its number and row, and is sent whether that was the last one."""


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
    on_best: OnBest | None = None,
) -> Fit:
    """Train the model in place and return its best epoch, by `objective.monitor(config)`.

    `on_epoch(epoch, row)` is called on every worker, and ends the training by returning True on any. `batch_loss` is
    given `(outputs, batch)` and replaces the objective's loss in training only. `after_step` is given the user's own
    module after every optimizer step; `on_best(epoch, weights)` the weights of an epoch that is the best so far, before
    its row is reported. With `checkpoints` the fit goes on from the newest one. Raises StageError when
    the loss stops being finite.
    """
    epochs = train_epochs(
        model,
        data,
        config,
        objective=objective,
        seed=seed,
        world=world,
        checkpoints=checkpoints,
        batch_loss=batch_loss,
        after_step=after_step,
        on_best=on_best,
    )
    verdict: bool | None = None
    try:
        while True:
            try:
                epoch, row = epochs.send(verdict)
            except StopIteration as ended:
                fitted: Fit = ended.value
                return fitted
            verdict = on_epoch(epoch, row) if on_epoch is not None else None
    finally:
        if checkpoints is not None:
            checkpoints.flush()


def train_epochs(
    model: nn.Module,
    data: Data,
    config: TrainConfig,
    *,
    objective: Objective,
    seed: int,
    world: World | None = None,
    checkpoints: Checkpoints | None = None,
    batch_loss: BatchLoss | None = None,
    after_step: Callable[[nn.Module], None] | None = None,
    on_best: OnBest | None = None,
) -> Epochs:
    """What `fit` goes through, epoch by epoch. Several trainings may take turns: an epoch depends on its seed alone."""
    world = world or World()
    monitor, mode = objective.monitor(config)
    check_samples(data)
    materialize(model, lambda: first_rows(data["train"], 2)[0])
    require_plain_state(model)
    if isinstance(objective.loss, nn.Module):
        objective.loss.to(world.device)
    rule = LossRule(
        batch_loss or (lambda outputs, batch: objective.part_of_loss(outputs, batch[1])),
        train_step=objective.train_step if batch_loss is None else None,
        precision=config.precision,
        device=world.device,
    )

    def example() -> Batch:
        return first_sample(data["train"], world.device)

    choice = None
    if config.strategy.name == "auto":
        own_step = objective.train_step is not None
        choice = choose_strategy(
            model, config, world, rule=rule, example=example, own_step=own_step, checkpoints=checkpoints
        )
        config = config.model_copy(update={"strategy": choice.strategy})
    loss = trained_loss(objective, config, by_another=batch_loss is not None)
    loss_before: dict[str, Tensor] = copy_on_cpu(loss.state_dict()) if loss is not None else {}
    least = find_min_rows(model, data["train"], config, rule=rule, world=world)
    layout = Layout(model)
    if config.strategy.is_replicated:

        def few() -> Batch:
            return first_rows(data["train"], SAMPLES, device=world.device)

        layout = choose_layout(model, few, rule=rule, optimizer=config.optimizer, world=world)
    if config.compile:
        model.compile()
    parallel = parallelize(model, config.strategy, world, batch_size=config.batch_size, example=lambda: example()[0])
    steps_per_epoch = config.steps_per_epoch or num_steps(data["train"], config.batch_size, min_rows=least.rows)
    trainee = start_training(parallel, rule, config, steps_per_epoch=steps_per_epoch, mode=mode, loss=loss)

    parallel.module.eval()
    with torch.compiler.set_stance("force_eager") if config.compile else nullcontext():
        layout.attempt(
            lambda: check_outputs(parallel.outputs, data["val"], objective, world=parallel.data),
            optimizer=trainee.optimizer,
        )
        notes = dict(least.notes)
        if batch_loss is None:
            if objective.train_step is None and not objective.is_exact:
                num_parts = parallel.data.size * config.parts_per_worker
                count = max(least.rows, config.batch_size // num_parts)
                rows = first_rows(data["train"], count, device=world.device)
                with torch.no_grad():
                    outputs = parallel.outputs(rows[0])
                refuse_hidden_parameters(objective, in_full_precision(outputs), rows[1])
            notes |= notes_on_split_loss(parallel, data["train"], config, objective, seed=seed, min_rows=least.rows)

    progress, best_state, best_loss = take_up(trainee, checkpoints, world=world)
    is_over = config.gives_up(progress.epoch, best_epoch=progress.best_epoch)
    checkpoint_s = 0.0
    rows_at_once = config.rows_at_once(on_cpu=world.device.type == "cpu")
    layers: Marks = {}

    def validate() -> dict[str, float]:
        copy_buffers_from_first(parallel.module, world=parallel.data)
        if loss is not None:
            copy_buffers_from_first(loss, world=parallel.data)
        trainee.train(False)

        def measured() -> dict[str, float]:
            nonlocal layers
            first = marking(parallel.module) if not parallel.is_sharded and world.rank == 0 else nullcontext(Marks())
            with trainee.averaged(), first as layers:
                return evaluate(
                    parallel.outputs, data["val"], objective, split="val", batch_size=rows_at_once, world=parallel.data
                )

        return layout.attempt(measured, optimizer=trainee.optimizer)

    while progress.epoch < config.epochs and not is_over:
        epoch, phases, started = progress.epoch + 1, Phases(), time.perf_counter()
        seed_everything(derive_seed(seed, epoch, parallel.data.rank))

        with deterministic_algorithms(config.deterministic):
            row = _train_epoch(
                trainee,
                data["train"],
                config,
                epoch=epoch,
                seed=seed,
                progress=progress,
                phases=phases,
                layout=layout,
                min_rows=least.rows,
                validate=validate,
                after_step=after_step,
            )
        with phases.time("val"):
            row |= validate()
        trainee.schedule.epoch_over(row[monitor])
        row |= {**phases.row(), "checkpoint_s": checkpoint_s, "seconds": time.perf_counter() - started}

        is_best = is_better(row[monitor], [past[monitor] for past in progress.history], mode)
        progress.epoch = epoch
        progress.history.append(row)
        if is_best:
            progress.best_epoch, best_state = epoch, trainee.keep_weights_that_count()
            best_loss = _changed(trainee.keep_loss_that_counts(), loss_before)
            progress.layers = layers
            if on_best is not None:
                on_best(epoch, parallel.gather(best_state), best_loss)
        asked_to_stop = (yield epoch, row) is True
        is_stale = config.gives_up(epoch, best_epoch=progress.best_epoch)
        is_over = any_worker(asked_to_stop or is_stale, world=world)

        started = time.perf_counter()
        if checkpoints is not None:
            put_down(trainee, progress, checkpoints, is_best=is_best, world=world)
        checkpoint_s = time.perf_counter() - started

    layout.leave()
    record = choice.record() if choice else {}
    best_loss = _changed(best_loss, loss_before)
    return progress.fit(state=parallel.gather(best_state), choice=record, loss_state=best_loss, notes=notes)


def _changed(state: dict[str, Tensor], before: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a loss, or nothing where it is what it was before training, such as weights of classes."""
    return state if any(not torch.equal(tensor, before[name]) for name, tensor in state.items()) else {}


def _train_epoch(
    trainee: Trainee,
    dataset: Dataset[Any],
    config: TrainConfig,
    *,
    epoch: int,
    seed: int,
    progress: Progress,
    phases: Phases,
    layout: Layout,
    min_rows: int,
    validate: Callable[[], dict[str, float]],
    after_step: Callable[[nn.Module], None] | None,
) -> dict[str, float]:
    """One pass over the training data: `train_loss` (the mean over samples), the last step's `lr`, and the speed."""
    parallel, started = trainee.parallel, time.perf_counter()
    batches = epoch_batches(
        dataset,
        batch_size=config.batch_size,
        seed=seed,
        epoch=epoch,
        world=parallel.data,
        device=parallel.data.device,
        accumulate_steps=config.accumulate_steps,
        max_steps=config.steps_per_epoch,
        min_rows=min_rows,
    )
    losses, step, lr = LossMeter(epoch=epoch, world=parallel.data), 1, 0.0

    trainee.train()
    for share, batch in phases.waiting("data", batches):
        with phases.time("train"):
            loss = layout.attempt(partial(trainee.backward, batch, share), optimizer=trainee.optimizer)
            losses.add(loss, share, step=step)
            if not share.ends_step:
                continue

            if step == 1:
                parallel.after_first_step()
            lr = trainee.schedule.lr
            trainee.step(clip_grad_norm=config.clip_grad_norm)
            if after_step is not None:
                after_step(parallel.module)
            trainee.update_averages()
            step, progress.steps = step + 1, progress.steps + 1

        if config.validate_every_steps and progress.steps % config.validate_every_steps == 0:
            with phases.time("val"):
                progress.validations.append({"step": progress.steps, **validate()})
            trainee.train()

    train_loss, num_samples = losses.mean()
    samples_per_s = num_samples / (time.perf_counter() - started)
    return {"train_loss": train_loss, "lr": lr, "train_samples_per_s": samples_per_s}
