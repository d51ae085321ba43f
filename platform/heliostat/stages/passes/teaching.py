"""What a student learns from: the outputs of teachers, computed once for all candidates that learn from the same."""

import fcntl
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from heliostat.compression.distill import distillation_loss, matched_features, mean_outputs, teacher_outputs
from heliostat.compression.formats import load_model
from heliostat.compression.soft_loss import SoftLoss, choose_soft_loss
from heliostat.errors import StageError
from heliostat.runtime.hang import waiting
from heliostat.stages.finetuning import SoftTargets
from heliostat.stages.models import torch_model
from heliostat.stages.passes.workshop import Source, Workshop
from heliostat.training.batches import Batch, first_rows
from heliostat.training.first_batch import check_samples
from heliostat.training.task import Data

FIRST_ROWS = 256
"""Whose outputs tell one teacher from another."""
LOOKED_AT = 64
"""The number of samples on which the loss against the teacher is chosen."""
AT_MOST_MB = 1000.0
"""Outputs that would take more are computed for each batch anew: they have to be in memory beside the data."""

Teacher = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Lesson:
    """What a student is trained with."""

    data: Data
    loss: Callable[[Tensor, Batch], Tensor] | None = None
    """Of the outputs for a batch; None is the task's own."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What the record says of it."""


@contextmanager
def taught_by(
    shop: Workshop,
    teachers: Sequence[Source],
    settings: SoftTargets | None,
    *,
    student: nn.Module,
    option: str = "loss",
) -> Iterator[Lesson]:
    """What a student of these teachers is trained with; without settings, the task's own loss and data.

    Several teachers' outputs are averaged. They are computed once, before training, where the inputs are whole tensors
    and the outputs fit, and at every batch else, or if layers are matched. Other candidates find them on the shelf.
    `option` is what the choice of the loss is called in the file.

    Raises:
        SpecError: a layer that is not there.
        StageError: teachers and student have different outputs, or it is not clear how to compare them; layers are to
            be matched with those of several teachers, or of one that is no torch model.
    """
    if settings is None:
        yield Lesson(shop.data)
        return
    if settings.features and len(teachers) > 1:
        raise StageError(f"features: layers are matched with those of one teacher, not of {len(teachers)}")
    check_samples(shop.data)
    loss = shop.objective.mean_loss
    names = ", ".join(teacher.node for teacher in teachers)
    model = torch_model(teachers[0]) if settings.features else None
    teach: Teacher = mean_outputs([load_model(teacher.folder) for teacher in teachers]) if model is None else model
    soft_loss = (
        _soft_loss(shop, settings, teach, student=student, names=names, option=option) if settings.alpha else None
    )
    details = _described(soft_loss, names)

    def batch_loss(outputs: Tensor, batch: Batch, answers: Tensor | None) -> Tensor:
        if soft_loss is None or answers is None:
            return loss(outputs, batch[1])
        return distillation_loss(
            outputs,
            answers,
            batch[1],
            loss=loss,
            soft_loss=soft_loss,
            temperature=settings.temperature,
            alpha=settings.alpha,
        )

    if model is not None:
        with matched_features(student, model, settings.features) as feature_loss:

            def with_features(outputs: Tensor, batch: Batch) -> Tensor:
                with torch.no_grad():
                    answers = model(batch[0])
                return batch_loss(outputs, batch, answers) + settings.feature_weight * feature_loss(len(batch[0]))

            yield Lesson(shop.data, with_features, details)
    elif soft_loss is None:
        yield Lesson(shop.data, details=details)
    elif (data := _with_outputs(shop, teach)) is not None:
        yield Lesson(data, lambda outputs, batch: batch_loss(outputs, batch, batch[-1]), details)
    else:

        def asked(outputs: Tensor, batch: Batch) -> Tensor:
            return batch_loss(outputs, batch, teacher_outputs(teach, batch[0], shop.batch_size))

        yield Lesson(shop.data, asked, details)


def _soft_loss(
    shop: Workshop, settings: SoftTargets, teach: Teacher, *, student: nn.Module, names: str, option: str
) -> SoftLoss | None:
    """How outputs are compared, by those of the first samples; None where they are not learned.

    Raises StageError when student and teachers do not have equally many.
    """
    inputs, targets, *_ = first_rows(shop.data["train"], LOOKED_AT)
    was_training = student.training
    answers, outputs = (teacher_outputs(run, inputs, shop.batch_size) for run in (teach, student.eval()))
    student.train(was_training)
    if outputs.shape != answers.shape:
        raise StageError(
            f"for {len(inputs)} samples the student gives outputs {tuple(outputs.shape)}, and what it learns from "
            f"({names}) {tuple(answers.shape)}; both must have the same"
        )
    if not settings.alpha:
        return None
    return choose_soft_loss(settings.loss, answers, targets, loss=shop.objective.named_loss, option=option)


def _described(soft_loss: SoftLoss | None, names: str) -> dict[str, Any]:
    if soft_loss is None:
        return {"distillation": {"teachers": names, "loss": None, "why": "alpha is 0: the outputs are not learned"}}
    return {"distillation": {"teachers": names, "loss": soft_loss.name, "why": soft_loss.why}}


def _with_outputs(shop: Workshop, teacher: Teacher) -> Data | None:
    """The data, whose training split has the teacher's outputs behind all else; None unless it is tensors and they fit.

    A dataset that is derived from `TensorDataset` may compute its samples.
    """
    train = shop.data["train"]
    if type(train) is not TensorDataset:
        return None
    inputs = train.tensors[0]
    first = teacher_outputs(teacher, inputs[:FIRST_ROWS], shop.batch_size)
    if first.nbytes / len(first) * len(inputs) > AT_MOST_MB * 1e6:
        return None
    outputs = _shared(shop.shelf, teacher, inputs, first, batch_size=shop.batch_size)
    return {**shop.data, "train": TensorDataset(*train.tensors, outputs)}


def _shared(shelf: Path | None, teacher: Teacher, inputs: Tensor, first: Tensor, *, batch_size: int) -> Tensor:
    """Return the teacher's outputs, computed by the first candidate that needs them.

    `first` are the outputs of the first rows.

    The file is named by the inputs and by these outputs, which no other teacher gives. It is mapped, so that processes
    share its memory. A shelf that cannot be written, or a file that was cut short, only costs the sharing.
    """
    if shelf is None:
        return teacher_outputs(teacher, inputs, batch_size)
    digest = hashlib.blake2b(digest_size=8)
    for tensor in (inputs, first):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
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
                outputs = teacher_outputs(teacher, inputs, batch_size)
                _leave(outputs, file)
    return teacher_outputs(teacher, inputs, batch_size) if outputs is None else outputs


def _leave(outputs: Tensor, file: Path) -> None:
    partial = file.with_suffix(".partial")
    try:
        torch.save(outputs, partial)
        partial.replace(file)
    except (OSError, RuntimeError):  # which is torch's word for a full disk
        partial.unlink(missing_ok=True)
