"""What is looked at before the first epoch: samples of `train` and `val`, and what the model makes of those of `val`.

A task that cannot work is refused there, in seconds, and not when its model is to be saved. The first training step
looks at the outputs and the loss of a batch in training (`losses.py`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from heliostat.errors import StageError
from heliostat.training.batches import first_rows
from heliostat.training.structure import require_loss, require_outputs, require_sample
from heliostat.training.task import Objective
from heliostat.training.world import World

ROWS = 4
"""The samples that have to make a batch."""


def check_samples(data: Mapping[str, Dataset[Any]]) -> None:
    """Look at the first sample of `train` and `val`, and at whether the first few make a batch. `test` is left alone.

    Raises StageError, with the structure, for what training, evaluation or saving could not take.
    """
    for split, dataset in data.items():
        if split != "test":
            require_sample(_first(dataset, split), split=split)
            first_rows(dataset, ROWS)


def check_outputs(model: Callable[[Tensor], Any], dataset: Dataset[Any], objective: Objective, *, world: World) -> None:
    """Look at what the model, in evaluation, gives for the first samples of `val`, and at the loss if training has not.

    Raises StageError for outputs that are not one tensor with a row for each sample.
    """
    inputs, targets, *_ = first_rows(dataset, ROWS, device=world.device)
    with torch.no_grad():
        outputs = model(inputs)
        require_outputs(outputs, inputs)
        if objective.train_step is not None:  # the task's own loss is then called in evaluation alone
            require_loss(objective.loss(outputs, targets))


def _first(dataset: Any, split: str) -> Any:
    if not isinstance(dataset, IterableDataset):
        return dataset[0]
    for sample in dataset:
        return sample
    raise StageError(
        f"task.data: the stream {split!r} gave no sample; it must start anew each time it is iterated over"
    )
