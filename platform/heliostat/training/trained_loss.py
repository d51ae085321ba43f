"""A loss with a state of its own: parameters, which are trained with the model, or buffers that it changes.

Both are kept in checkpoints and saved beside the model, since the loss on `val` and `test` is measured with them. Where
another loss is trained, such as a distillation's, the state stays what it was.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from heliostat.errors import StageError
from heliostat.training.config import TrainConfig
from heliostat.training.losses import mean_of
from heliostat.training.structure import require_loss
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


def refuse_hidden_parameters(objective: Objective, outputs: Tensor, targets: Tensor) -> None:
    """Raise StageError where a loss depends on parameters that it does not expose: they would never be trained."""
    own = objective.loss
    if isinstance(own, nn.Module):
        own = copy.deepcopy(own).eval()
    shown = {id(p) for p in own.parameters()} if isinstance(own, nn.Module) else set()
    with torch.enable_grad():
        loss = own(outputs.detach(), targets)
    with torch.no_grad():  # of these outputs the loss may have no gradient
        require_loss(loss)
    hidden = [tuple(p.shape) for p in _leaves(mean_of(loss)) if id(p) not in shown]
    if hidden:
        raise StageError(
            f"task.loss: it depends on parameters of the shapes {hidden} that no optimizer would get; make it an "
            "nn.Module that holds them, or fix them by requires_grad_(False)"
        )


def _leaves(loss: Tensor) -> list[nn.Parameter]:
    """The parameters that a loss was computed from."""
    found, seen, ahead = [], set(), [loss.grad_fn]
    while ahead:
        node: Any = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, nn.Parameter):
            found.append(variable)
        ahead += [before for before, _ in node.next_functions]
    return found


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
