"""What a student learns from: the outputs of teachers, computed once for all candidates that learn from the same."""

import fcntl
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from heliostat.compression.distill import distillation_loss, matched_features, mean_outputs, teacher_outputs
from heliostat.compression.formats import load_model
from heliostat.errors import StageError
from heliostat.runtime.hang import waiting
from heliostat.stages.finetuning import SoftTargets
from heliostat.stages.models import torch_model
from heliostat.stages.passes.workshop import Source, Workshop
from heliostat.training.batches import Batch
from heliostat.training.task import Data, build_objective

BATCH_SIZE = 256
AT_MOST_MB = 1000.0
"""Outputs that would take more are computed for each batch anew: they have to be in memory beside the data."""

Lesson = tuple[Callable[[Tensor, Batch], Tensor] | None, Data]
Teacher = Callable[[Tensor], Tensor]


@contextmanager
def taught_by(
    shop: Workshop, teachers: Sequence[Source], settings: SoftTargets | None, *, student: nn.Module
) -> Iterator[Lesson]:
    """The loss of a batch for a student of these teachers, and the data to train it on; without settings, the task's.

    Several teachers' outputs are averaged. They are computed once, before training, where the inputs are whole tensors
    and the outputs fit, and at every batch else, or if layers are matched. Other candidates find them on the shelf.

    Raises:
        SpecError: a layer that is not there.
        StageError: layers are to be matched with those of several teachers, or of one that is no torch model.
    """
    if settings is None:
        yield None, shop.data
        return
    loss = build_objective(shop.task).loss

    def soft_loss(outputs: Tensor, batch: Batch, soft: Tensor) -> Tensor:
        alpha, temperature = settings.alpha, settings.temperature
        return distillation_loss(outputs, soft, batch[1], loss=loss, temperature=temperature, alpha=alpha)

    if not settings.features:
        mean = mean_outputs([load_model(teacher.folder) for teacher in teachers])

        def answers(batch: Batch) -> Tensor:
            soft: Tensor = batch[2] if len(batch) > 2 else mean(batch[0])
            return soft

        yield (lambda outputs, batch: soft_loss(outputs, batch, answers(batch))), _with_outputs(shop, mean)
        return

    if len(teachers) > 1:
        raise StageError(f"features: layers are matched with those of one teacher, not of {len(teachers)}")
    model = torch_model(teachers[0])
    with matched_features(student, model, settings.features) as feature_loss:

        def batch_loss(outputs: Tensor, batch: Batch) -> Tensor:
            with torch.no_grad():
                soft = model(batch[0])
            return soft_loss(outputs, batch, soft) + settings.feature_weight * feature_loss()

        yield batch_loss, shop.data


def _with_outputs(shop: Workshop, teacher: Teacher) -> Data:
    """The data, whose training split has the teacher's outputs as a third tensor, if it is tensors and they fit."""
    train = shop.data["train"]
    if not isinstance(train, TensorDataset):
        return shop.data
    inputs, targets = train.tensors[:2]
    first = teacher_outputs(teacher, inputs[:BATCH_SIZE], BATCH_SIZE)
    if first.nbytes / len(first) * len(inputs) > AT_MOST_MB * 1e6:
        return shop.data
    outputs = _shared(shop.shelf, teacher, inputs, first)
    return {**shop.data, "train": TensorDataset(inputs, targets, outputs)}


def _shared(shelf: Path | None, teacher: Teacher, inputs: Tensor, first: Tensor) -> Tensor:
    """The teacher's outputs, of which `first` are those of the first batch: by whoever needed them first.

    The file is named by the inputs and by these outputs, which no other teacher gives. It is mapped, so that processes
    share its memory. A shelf that cannot be written, or a file that was cut short, only costs the sharing.
    """
    if shelf is None:
        return teacher_outputs(teacher, inputs, BATCH_SIZE)
    digest = hashlib.blake2b(digest_size=8)
    for tensor in (inputs, first):
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    file = shelf / f"outputs-{digest.hexdigest()}.pt"
    outputs: Tensor | None = None
    with suppress(OSError):
        shelf.mkdir(parents=True, exist_ok=True)
        with file.with_suffix(".lock").open("w") as lock:
            with waiting():
                fcntl.flock(lock, fcntl.LOCK_EX)
            with suppress(OSError, RuntimeError):
                outputs = torch.load(file, mmap=True, weights_only=True)
            if outputs is None:
                outputs = teacher_outputs(teacher, inputs, BATCH_SIZE)
                _leave(outputs, file)
    return teacher_outputs(teacher, inputs, BATCH_SIZE) if outputs is None else outputs


def _leave(outputs: Tensor, file: Path) -> None:
    partial = file.with_suffix(".partial")
    try:
        torch.save(outputs, partial)
        partial.replace(file)
    except (OSError, RuntimeError):  # which is torch's word for a full disk
        partial.unlink(missing_ok=True)
