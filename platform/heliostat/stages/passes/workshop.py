"""What every pass works with: a task, its data, and the ways to train a model on, to save it and to compare it."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from heliostat.compression.formats import load_model, load_torch, save_torch
from heliostat.compression.measure import compare_outputs
from heliostat.compression.parity import check_parity, values_of_module
from heliostat.compression.proof import CHECKED_ROWS
from heliostat.core.imports import own_sources
from heliostat.core.mapping import Map, in_turn
from heliostat.core.spec import Task
from heliostat.training.batches import epoch_batches
from heliostat.training.checkpoints import Checkpoints
from heliostat.training.config import StrategyConfig, TrainConfig
from heliostat.training.loop import Fit, fit
from heliostat.training.losses import BatchLoss
from heliostat.training.seeding import seed_everything
from heliostat.training.task import Data, Objective, build_objective
from heliostat.training.trained_loss import save_loss
from heliostat.training.world import World

log = logging.getLogger(__name__)

PARITY_SAMPLES = 256
BATCH = 64


class Source(Protocol):
    """A model that goes into a pass: an artifact, or what another pass made."""

    @property
    def node(self) -> str:
        """What it is called."""

    @property
    def folder(self) -> Path: ...


@dataclass(frozen=True)
class Workshop:
    """Where one model is made. `folder` is what comes out; a training that was cut off left its checkpoints there."""

    task: Task
    recipe: TrainConfig
    """How the model was trained."""
    data: Data
    seed: int
    root: Path
    """The folder of the user's modules."""
    folder: Path
    on_epoch: Callable[[int, Mapping[str, float]], None]
    """Told of each epoch of fine-tuning, counted from 1 over all trainings of a pass."""
    warn: Callable[[str], None] = log.warning
    """Told of what a person should know although the work goes on."""
    shelf: Path | None = None
    """Where candidates that are made of the same leave for each other what all of them need, named by its content."""
    teacher: Source | None = None
    """Whom fine-tuning with `distillation` learns from; the model that goes into the pass, unless given."""
    loss_state: dict[str, Tensor] = field(default_factory=dict)
    """What the task's loss was trained to, with the model; fine-tuning changes it in place. Empty without a state."""
    side_by_side: Map = in_turn
    """How a pass carries out what it tries many times over, such as a scan of a model's layers."""

    @property
    def portable(self) -> "Workshop":
        """The same for another process, where nobody is told of epochs; the test split stays here."""
        data = {split: self.data[split] for split in ("train", "val")}
        return replace(self, data=data, on_epoch=_unheard, side_by_side=in_turn)

    @property
    def objective(self) -> Objective:
        """The task's objective anew, with its loss as it was trained."""
        return build_objective(self.task, self.loss_state)

    def samples(self, split: str, count: int) -> Tensor:
        """The inputs of the first `count` samples of a split, as one batch."""
        return first_inputs(self.data, split=split, count=count)

    @property
    def batch_size(self) -> int:
        """How many samples are computed at once without gradients."""
        return self.recipe.rows_at_once()

    @property
    def example(self) -> Tensor:
        """A batch of one real sample: what a model is traced with."""
        return self.samples("val", 1)

    @property
    def proof(self) -> Tensor:
        """A batch of a few real samples: what changes of a model are proven on before it is trained."""
        return self.samples("val", CHECKED_ROWS)

    def checkpoints(self, phase: str) -> Checkpoints:
        """Where a training keeps its checkpoints: the last one in the folder itself, an earlier phase below."""
        return Checkpoints(self.folder / "checkpoints" / phase, warn=self.warn)

    def fine_tune(
        self,
        model: nn.Module,
        config: TrainConfig,
        *,
        batch_loss: BatchLoss | None = None,
        after_step: Callable[[nn.Module], None] | None = None,
        data: Data | None = None,
        phase: str = "",
        keep: Literal["best", "last"] = "best",
        earlier: int = 0,
    ) -> Fit:
        """Train `model` in place with the one loop, going on from the workshop's own checkpoints after a crash.

        It is one worker that does, whatever strategy the model was first trained with.
        A pass that trains more than once names each `phase` but the last, and says how many `earlier` epochs it
        reported. The model ends with the weights of the best epoch, or the last.
        """
        seed_everything(self.seed)
        objective = self.objective
        fitted = fit(
            model,
            data or self.data,
            config.model_copy(update={"strategy": StrategyConfig(name="single")}),
            objective=objective,
            seed=self.seed,
            on_epoch=lambda epoch, row: self.on_epoch(earlier + epoch, row),
            checkpoints=self.checkpoints(phase),
            batch_loss=batch_loss,
            after_step=after_step,
        )
        if keep == "best":
            model.load_state_dict(fitted.state)
        if fitted.loss_state:
            last = objective.loss.state_dict() if isinstance(objective.loss, nn.Module) else {}
            self.loss_state.update(fitted.loss_state if keep == "best" else last)
        return fitted

    def save(
        self,
        model: nn.Module,
        *,
        history: Sequence[Mapping[str, Any]] = (),
        reference: str | None = None,
        **more: Any,
    ) -> list[str]:
        """Write a torch model artifact with the user's own source beside the weights; the names of its files.

        `more` goes to `formats.save_torch`.
        """
        reference = reference or self.task.model
        files = save_torch(
            model,
            self.folder,
            reference=reference,
            model_args=self.recipe.model_args,
            history=history,
            code=own_sources([reference], self.root),
            example=self.example,
            seed=self.seed,
            **more,
        )
        return [*files, *self.save_loss()]

    def save_loss(self) -> list[str]:
        """Write what the task's loss was trained to, if anything, beside the model; the names of the files."""
        return save_loss(self.loss_state, self.folder)

    def reload_parity(self, model: nn.Module) -> dict[str, Any]:
        """How far what was saved, loaded again, is from `model` on real samples of the validation split.

        Raises StageError if it is too far, and names the first layer where they part.
        """
        loaded, inputs = load_torch(self.folder), self.samples("val", PARITY_SAMPLES)
        what, values = "the model, saved and loaded again,", partial(values_of_module, loaded)
        check_parity(model.eval(), loaded, inputs, what=what, values=values, batch_size=self.batch_size)
        return self.parity(model, against="the model before saving")

    def parity(self, source: Any, *, against: str) -> dict[str, Any]:
        """How far what is in the folder, loaded again, is from `source` on real samples of the validation split."""
        inputs = self.samples("val", PARITY_SAMPLES)
        return {
            "against": against,
            **compare_outputs(load_model(self.folder), source, inputs, batch_size=self.batch_size),
        }

    def backward_on(self, count: int) -> Callable[[nn.Module], None]:
        """A function that adds to a model's parameters the gradients of the loss over so many training samples."""
        loss, steps = self.objective.mean_loss, -(-count // BATCH)
        step_size = -(-self.recipe.batch_size // self.recipe.accumulate_steps)
        at_once = min(BATCH, self.batch_size, step_size)

        def backward(model: nn.Module) -> None:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            for _, batch in epoch_batches(
                self.data["train"],
                batch_size=BATCH,
                seed=0,
                epoch=1,
                world=World(),
                device=torch.device("cpu"),
                max_steps=steps,
            ):
                for inputs, targets in zip(*(torch.split(item, at_once) for item in batch[:2])):
                    part = loss(model(inputs), targets) * (len(inputs) / len(batch[0]))
                    part.backward()  # type: ignore[no-untyped-call]

        return backward


def files_in(folder: Path) -> dict[str, bytes]:
    """The files of an artifact, to be written elsewhere by `write_files`: another machine may not see its folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def write_files(files: Mapping[str, bytes], folder: Path) -> None:
    """What `files_in` read, into a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _unheard(epoch: int, row: Mapping[str, float]) -> None: ...


def first_inputs(data: Data, *, split: str, count: int) -> Tensor:
    """The inputs of the first `count` samples of a split, as one batch."""
    dataset: Any = data[split]
    is_stream = isinstance(dataset, IterableDataset)
    rows = islice(dataset, count) if is_stream else (dataset[i] for i in range(min(count, len(dataset))))
    return torch.stack([torch.as_tensor(row[0]) for row in rows])
