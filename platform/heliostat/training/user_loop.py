"""The user's own training loop, `train_fn(context, config)`, in place of ours.

The context spreads the model and the batches over the workers, takes one row of metrics per epoch, and keeps the
checkpoints that are reported with them. The best epoch is decided as in our loop, among those with a checkpoint once
there is one.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, IterableDataset, Sampler

from heliostat.core.credentials import revealed
from heliostat.core.imports import resolve
from heliostat.core.spec import Task
from heliostat.errors import StageError, nearest
from heliostat.training.batches import counts_of
from heliostat.training.checkpoints import Checkpoints, State
from heliostat.training.config import TrainConfig
from heliostat.training.own_model import spread_for_own_loop, whole_checkpoint
from heliostat.training.progress import Fit, OnCheckpoint, OnEpoch, Progress, is_better, read_on_first_worker
from heliostat.training.seeding import seed_everything
from heliostat.training.strategies.choice import Choice
from heliostat.training.strategies.gradients import clip_gradients
from heliostat.training.strategies.parallel import copy_on_cpu
from heliostat.training.task import Objective, build_objective
from heliostat.training.trained_loss import has_parameters
from heliostat.training.world import World, any_worker, from_first_worker


class StopTraining(BaseException):
    """Ends the user's loop early from `report`. It is no error, so their `except Exception` must not catch it."""


class TrainContext:
    """What a user's loop is given. Every worker calls each method at the same point of its loop."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        objective: Objective,
        world: World,
        on_epoch: OnEpoch | None,
        checkpoints: Checkpoints | None,
        check_own: OnCheckpoint | None = None,
    ) -> None:
        self.rank = world.rank
        self.world_size = world.size
        self.device = world.device
        self.ended = ExitStack()
        """What is undone when the loop is over."""
        self._world = world
        self._config = config
        self._objective = objective
        self._on_epoch = on_epoch
        self._checkpoints = checkpoints
        self._check_own = check_own
        self._progress = Progress()
        self._checkpoint_epochs: list[int] = []
        self._best_state: dict[str, Tensor] | None = None
        self._best_loss: dict[str, Tensor] = {}
        self._choice: Choice | None = None
        self._row_started = time.perf_counter()

    def prepare(self, model: nn.Module, loader: DataLoader[Any]) -> tuple[nn.Module, DataLoader[Any]]:
        """The model under the config's strategy, and a loader of this worker's part of each batch.

        The loader's batch size is the global one. Under `fsdp` and `tp` the model has new parameters, so the optimizer
        is made after this. Raises StageError for a loader that several workers cannot share.
        """
        own = spread_for_own_loop(model, self._config, self._world)
        self.ended.callback(own.undo)
        self._choice = own.choice
        has_batch_norm = any(isinstance(module, _BatchNorm) for module in model.modules())
        min_rows = 2 if has_batch_norm else 1
        return own.module, _share_loader(loader, self._world, own.data, min_rows=min_rows)

    def clip_gradients(self, parameters: Iterable[nn.Parameter], max_norm: float) -> None:
        """`torch.nn.utils.clip_grad_norm_` that also takes a model of which only some layers are split."""
        clip_gradients(parameters, max_norm, stages=World(device=self.device))

    def report(self, metrics: Mapping[str, float], checkpoint: Mapping[str, Any] | None = None) -> None:
        """One epoch's row of metrics (rank 0's counts) and, where it should be kept, a checkpoint.

        A checkpoint is the model's state dict, or a mapping of tensors and plain values with the state dict as `model`.
        The state dict of a `task.loss` that has parameters goes with it as `loss`.
        What is spread over workers is kept whole, so every worker passes it, and any strategy may take it up.
        Raises StageError for metrics without the configured monitor, and for a checkpoint of anything else.
        """
        values = from_first_worker({name: float(value) for name, value in metrics.items()}, world=self._world)
        row = {"seconds": time.perf_counter() - self._row_started} | values
        progress = self._progress
        best = progress.history[progress.best_epoch - 1] if progress.best_epoch else None
        progress.epoch += 1
        progress.history.append(row)

        is_best = False
        if checkpoint is not None:
            checkpoint = whole_checkpoint(checkpoint)
            _require_plain(checkpoint, place="checkpoint")
            state, of_loss = _model_state(checkpoint), self._loss_state(checkpoint)
            if self._check_own is not None and not self._checkpoint_epochs:
                self._check_own(row, state)
            is_best = self._beats(best if self._checkpoint_epochs else None)
            self._checkpoint_epochs.append(progress.epoch)
            if is_best:
                self._best_state, self._best_loss = copy_on_cpu(state), copy_on_cpu(of_loss)
        elif not self._checkpoint_epochs:
            is_best = self._beats(best)
        if is_best:
            progress.best_epoch = progress.epoch

        asked_to_stop = self._on_epoch is not None and self._on_epoch(progress.epoch, row) is True
        is_over = any_worker(asked_to_stop, world=self._world)
        if checkpoint is not None and self._checkpoints is not None and self.rank == 0:
            saved = {
                "checkpoint": dict(checkpoint),
                "checkpoint_epochs": self._checkpoint_epochs,
                "progress": vars(progress),
            }
            self._checkpoints.save(saved, epoch=progress.epoch, is_best=is_best)
        if is_over:
            raise StopTraining
        self._row_started = time.perf_counter()

    def restore(self) -> State | None:
        """The last checkpoint reported before an interruption, or None. Epochs are then counted on from there."""
        found = read_on_first_worker(self._checkpoints, world=self._world)
        if found is None:
            return None
        saved, saved_best = found
        self._progress = Progress(**saved["progress"])
        self._checkpoint_epochs = saved["checkpoint_epochs"]
        self._best_state = copy_on_cpu(_model_state(saved_best["checkpoint"]))
        self._best_loss = copy_on_cpu(self._loss_state(saved_best["checkpoint"]))
        checkpoint: State = saved["checkpoint"]
        return checkpoint

    def result(self, *, require_checkpoint: bool) -> Fit:
        """What the loop came to. Raises StageError when it reported nothing, or no checkpoint where one is required."""
        progress = self._progress
        if not progress.history:
            raise StageError(
                "task.train_fn reported nothing; call context.report(metrics, checkpoint) after every epoch"
            )
        if self._best_state is None and require_checkpoint:
            raise StageError(
                "task.train_fn reported no checkpoint, so there is no model to keep; "
                "pass one with the metrics: context.report(metrics, checkpoint=model.state_dict())"
            )
        choice = self._choice.record() if self._choice else {}
        return progress.fit(state=self._best_state or {}, loss_state=self._best_loss, choice=choice)

    def _loss_state(self, checkpoint: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """What the loss was trained to. Without it the model would be measured by a loss that was never trained."""
        if not has_parameters(self._objective):
            return {}
        state = checkpoint.get("loss")
        if not isinstance(state, Mapping):
            raise StageError(
                "task.loss has parameters, which a reported checkpoint must hold too: pass "
                "{'model': model.state_dict(), 'loss': loss.state_dict()}"
            )
        return state

    def _beats(self, best: Mapping[str, float] | None) -> bool:
        """Whether the newest row is better than the best of its rivals. Without a figure to compare, it is."""
        row = self._progress.history[-1]
        monitor = self._config.monitor or self._objective.default_monitor
        if monitor in row:
            past = [best[monitor]] if best is not None and monitor in best else []
            return is_better(row[monitor], past, self._objective.mode(monitor))
        if self._config.monitor is not None:
            raise StageError(f"monitor: task.train_fn does not report {monitor!r}{nearest(monitor, row)}")
        return True


def run_user_loop(
    task: Task,
    config: TrainConfig,
    *,
    world: World,
    seed: int,
    on_epoch: OnEpoch | None = None,
    checkpoints: Checkpoints | None = None,
    require_checkpoint: bool = True,
    check_own: OnCheckpoint | None = None,
) -> Fit:
    """Call `task.train_fn`, seeded alike on every worker so that all build the same model, and gather its reports.

    `check_own` is given the first row that comes with a checkpoint, and its weights: what could not be kept in the end
    is raised before all epochs are over.
    """
    assert task.train_fn is not None
    train_fn: Callable[[TrainContext, TrainConfig], object] = resolve(task.train_fn)
    context = TrainContext(
        config,
        objective=build_objective(task),
        world=world,
        on_epoch=on_epoch,
        checkpoints=checkpoints,
        check_own=check_own,
    )
    seed_everything(seed)
    try:
        with suppress(StopTraining), context.ended:
            given = {"model_args": config.model_args, "data_args": config.data_args}
            train_fn(context, config.model_copy(update=revealed(given)))
    finally:
        if checkpoints is not None:
            checkpoints.flush()
    return context.result(require_checkpoint=require_checkpoint)


class _SharedBatches(Sampler[list[int]]):
    """One worker's part of every batch that rank 0's sampler draws; `data` are the workers that share a batch.

    In an epoch's last batch a worker without a sample repeats one: a user's loop weights its own losses. With batch
    norm, which one sample is too few for, no worker has fewer than `min_rows` of a batch that has as many.
    """

    def __init__(
        self, batch_sampler: Sampler[list[int]] | Iterable[list[int]], world: World, data: World, min_rows: int
    ) -> None:
        self._batch_sampler, self._min_rows = batch_sampler, min_rows
        self._world, self._data = world, data

    def __iter__(self) -> Iterator[list[int]]:
        drawn = [list(batch) for batch in self._batch_sampler] if self._world.rank == 0 else None
        for batch in from_first_worker(drawn, world=self._world):
            counts = counts_of(len(batch), self._data.size, self._min_rows)
            start = sum(counts[: self._data.rank])
            yield batch[start : start + counts[self._data.rank]] or batch[-self._min_rows :]

    def __len__(self) -> int:
        return len(self._batch_sampler)  # type: ignore[arg-type]


def _share_loader(loader: DataLoader[Any], world: World, data: World, *, min_rows: int) -> DataLoader[Any]:
    if world.size == 1:
        return loader
    if loader.batch_sampler is None or isinstance(loader.dataset, IterableDataset):
        raise StageError(
            "context.prepare: several workers share a loader by its batches of indices, and this one has none"
        )
    return DataLoader(
        loader.dataset,
        batch_sampler=_SharedBatches(loader.batch_sampler, world, data, min_rows),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


def _model_state(checkpoint: Mapping[str, Any]) -> Mapping[str, Tensor]:
    state = checkpoint.get("model", checkpoint)
    if not isinstance(state, Mapping) or not all(
        isinstance(value, Tensor) or name.endswith("_extra_state") for name, value in state.items()
    ):
        raise StageError(
            "a reported checkpoint must be the model's state dict, or a mapping with the state dict as 'model'"
        )
    return state


def _require_plain(value: Any, *, place: str) -> None:
    """Refuse now what a resumed run could not read back: loading never unpickles arbitrary objects."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _require_plain(item, place=f"{place}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            _require_plain(item, place=f"{place}[{number}]")
    elif type(value) not in (bool, int, float, str, type(None)) and not isinstance(value, Tensor):
        raise StageError(f"{place} is a {type(value).__name__}; a checkpoint holds tensors and plain values only")
