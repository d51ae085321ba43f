"""A loss with a state of its own: parameters, which are trained with the model, or buffers that it changes.

Both are kept in checkpoints and saved beside the model, since the loss on `val` and `test` is measured with them. Where
another loss is trained, such as a distillation's, the state stays what it was.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from heliostat.errors import StageError
from heliostat.training.config import TrainConfig
from heliostat.training.task import Objective

FILE = "loss.pt"


def trained_loss(objective: Objective, config: TrainConfig, *, by_another: bool) -> nn.Module | None:
    """The task's loss where training by it may change its state; None where it has none.

    Raises StageError where its parameters cannot be trained.
    """
    loss = objective.loss
    if not isinstance(loss, nn.Module):
        return None
    if by_another or not loss.state_dict():
        return None
    if has_parameters(objective):
        if objective.train_step is not None:
            raise StageError(
                "task.loss: it has parameters, which task.train_step does not train; leave task.train_step out, or "
                "make them parameters of the model"
            )
        if not config.strategy.is_replicated:
            raise StageError(
                f"strategy: {config.strategy.name!r} does not train the parameters of task.loss; take 'ddp', or make "
                "them parameters of the model"
            )
    return loss


def has_parameters(objective: Objective) -> bool:
    """Whether the loss has parameters to train."""
    return isinstance(objective.loss, nn.Module) and any(p.requires_grad for p in objective.loss.parameters())


def save_loss(state: Mapping[str, Tensor], folder: Path) -> list[str]:
    """Write the state of a trained loss beside a model; the names of the files."""
    if not state:
        return []
    torch.save(dict(state), folder / FILE)
    return [FILE]


def load_loss(folder: Path) -> dict[str, Tensor]:
    """The state of the loss that was trained with the model in a folder; empty where there is none."""
    if not (folder / FILE).is_file():
        return {}
    state: dict[str, Tensor] = torch.load(folder / FILE, map_location="cpu", weights_only=True)
    return state
