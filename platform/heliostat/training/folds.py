"""Cross-validation: k trainings of one config that advance together, an epoch of each in turn.

Folds are cut from `train` alone: `val` stays aside for the choices after the search, and `test` for the report. Each
fold is what one training is validated on while the others train it; all else, the seed of weights and order included,
is the same. A row has the mean over folds of every figure, and the spread of those on `val` (their sample standard
deviation, as `val_accuracy_std`); times add up.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset

from heliostat.core.spec import Task
from heliostat.errors import StageError
from heliostat.training.batches import whole_tensors
from heliostat.training.config import TrainConfig
from heliostat.training.first_batch import check_samples
from heliostat.training.loop import Epochs, Fit, OnEpoch, train_epochs
from heliostat.training.phases import TIMES
from heliostat.training.progress import is_better
from heliostat.training.seeding import seed_everything
from heliostat.training.task import Data, build_model, build_objective
from heliostat.training.world import World


def cross_validate(
    task: Task, config: TrainConfig, folds: Sequence[Data], *, world: World, seed: int, on_epoch: OnEpoch | None = None
) -> list[Fit]:
    """Train once for each fold and return the fits, each with its own best epoch.

    `on_epoch(epoch, row)` is given the row over all folds; True ends them all. So does `config.early_stop_epochs`, by
    the mean. One worker trains them. Raises StageError when a loss stops being finite.
    """
    objective = build_objective(task)
    monitor, mode = objective.monitor(config)
    alone = config.model_copy(update={"early_stop_epochs": 0})
    trainings: list[Epochs] = []
    for data in folds:
        seed_everything(seed)
        model = build_model(task, config.model_args)
        own = build_objective(task)  # a loss may have parameters
        trainings.append(train_epochs(model, data, alone, objective=own, seed=seed, world=world))

    means: list[float] = []
    best_epoch, stop, fits = 0, None, list[Fit]()
    while not fits:
        rows = []
        for training in trainings:
            try:
                epoch, row = training.send(stop)
                rows.append(row)
            except StopIteration as ended:
                fits.append(ended.value)
        if rows:
            mean = row_over_folds(rows)
            if is_better(mean[monitor], means, mode):
                best_epoch = epoch
            means.append(mean[monitor])
            asked_to_stop = on_epoch is not None and on_epoch(epoch, mean) is True
            stop = asked_to_stop or config.gives_up(epoch, best_epoch=best_epoch)
    return fits


def cut_folds(data: Data, *, folds: int, seed: int) -> list[Data]:
    """`train` and `val` of each fold, the same for the same seed. Raises StageError where `train` cannot be cut."""
    whole = data["train"]
    if isinstance(whole, IterableDataset):
        raise StageError("folds are cut from a `train` split that can be indexed, and this one is a stream")
    if len(whole) < folds:  # type: ignore[arg-type]
        raise StageError(f"{len(whole)} training samples cannot be cut into {folds} folds")  # type: ignore[arg-type]
    check_samples(data)
    fold_of = assign_folds(classes_of(whole), folds=folds, seed=seed)
    return [
        {"train": Subset(whole, _indices(fold_of != fold)), "val": Subset(whole, _indices(fold_of == fold))}
        for fold in range(folds)
    ]


def assign_folds(classes: Tensor, *, folds: int, seed: int) -> Tensor:
    """The fold of each sample. The samples of one class, and all together, are spread evenly to within one.

    Shuffled, ordered by class, and dealt out in turn: stratified, as far as there are classes to tell apart.
    """
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
    order = order[torch.argsort(classes[order], stable=True)]
    fold_of = torch.empty_like(order)
    fold_of[order] = torch.arange(len(order)) % folds
    return fold_of


def classes_of(dataset: Dataset[Any]) -> Tensor:
    """The class of each sample where its target is a whole number; all the same where it is anything else."""
    found = whole_tensors(dataset)
    if found is None:
        targets = [torch.as_tensor(dataset[index][1]) for index in range(len(dataset))]  # type: ignore[arg-type]
        are_alike = len({target.shape for target in targets}) == 1
        column = torch.stack(targets) if are_alike else torch.zeros(len(targets), 1)
    else:
        tensors, index_map = found
        column = tensors[1] if index_map is None else tensors[1][index_map]
    is_class = column.ndim == 1 and not column.is_floating_point()
    return column if is_class else torch.zeros(len(column), dtype=torch.long)


def row_over_folds(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """One epoch's rows of all folds as one."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    means = {name: sum(values) if name in TIMES else fmean(values) for name, values in columns.items()}
    figures = [name for name in columns if name.startswith("val_") and name not in TIMES]
    spreads = {f"{name}_std": float(np.std(columns[name], ddof=1)) for name in figures}
    return means | spreads


def _indices(mask: Tensor) -> list[int]:
    indices: list[int] = mask.nonzero().flatten().tolist()
    return indices
