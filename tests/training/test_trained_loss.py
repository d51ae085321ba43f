"""A loss with parameters is trained with the model, kept in checkpoints, and returned with the best epoch."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from heliostat.errors import StageError
from heliostat.training.checkpoints import Checkpoints
from heliostat.training.config import TrainConfig
from heliostat.training.evaluation import evaluate
from heliostat.training.loop import Fit, fit
from heliostat.training.losses import BatchLoss
from heliostat.training.task import Objective, build_objective
from heliostat.training.trained_loss import load_loss, save_loss, trained_loss

Data = dict[str, Dataset[Any]]


class Centres(nn.Module):
    """Cosine softmax with learned class centres; in training the right class is a margin further away (CosFace)."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 16, generator=torch.Generator().manual_seed(1)))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        cosines = functional.normalize(outputs) @ functional.normalize(self.weight).T
        if self.training:
            self.seen += len(targets)
            cosines = cosines - 0.2 * functional.one_hot(targets, 3)
        return functional.cross_entropy(10 * cosines, targets)


INSTANCE = Centres()


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.1), nn.Linear(16, 16))


def own_task(loss: str) -> Any:
    sys.modules["own_losses"] = sys.modules[__name__]
    return SimpleNamespace(loss=f"own_losses:{loss}", metrics=(), train_step=None)


@pytest.fixture
def train(data: Data) -> Callable[..., Fit]:
    def run(
        *,
        kept: Checkpoints | None = None,
        objective: Objective | None = None,
        batch_loss: BatchLoss | None = None,
        **options: Any,
    ) -> Fit:
        config = TrainConfig(**{"epochs": 3, "batch_size": 8, "monitor": "val_loss", **options})
        objective = objective or Objective(Centres())
        return fit(model(), data, config, objective=objective, seed=1, checkpoints=kept, batch_loss=batch_loss)

    return run


def fresh_figures(fitted: Fit, data: Data) -> dict[str, float]:
    trained, loss = model(), Centres()
    trained.load_state_dict(fitted.state)
    loss.load_state_dict(fitted.loss_state)
    return evaluate(trained, data["val"], Objective(loss), split="val")


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9}, {"precision": "fp16", "clip_grad_norm": 0.5}])
def test_the_loss_is_trained_and_comes_with_the_weights_that_were_validated(
    train: Callable[..., Fit], data: Data, options: dict[str, Any]
) -> None:
    fitted = train(**options)
    assert not torch.allclose(fitted.loss_state["weight"], Centres().weight, atol=1e-2)
    assert fresh_figures(fitted, data)["val_loss"] == pytest.approx(fitted.metrics["val_loss"], rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9}])
def test_an_interrupted_training_of_a_loss_equals_an_uninterrupted_one_bit_for_bit(
    train: Callable[..., Fit], tmp_path: Path, options: dict[str, Any]
) -> None:
    train(epochs=2, kept=Checkpoints(tmp_path), **options)
    resumed, whole = train(kept=Checkpoints(tmp_path), **options), train(**options)
    for one, other in ((resumed.loss_state, whole.loss_state), (resumed.state, whole.state)):
        assert list(one) == list(other)
        assert all(torch.equal(one[name], other[name]) for name in one)
    again = train(kept=Checkpoints(tmp_path), **options)
    assert all(torch.equal(again.loss_state[name], whole.loss_state[name]) for name in whole.loss_state)


def test_a_loss_whose_state_training_leaves_alone_has_none_to_save(train: Callable[..., Fit], tmp_path: Path) -> None:
    weighted = Objective(nn.CrossEntropyLoss(weight=torch.ones(16)))
    assert train(objective=weighted).loss_state == {}
    assert save_loss({}, tmp_path) == []
    assert load_loss(tmp_path) == {}


def test_the_state_of_a_loss_is_loaded_as_it_was_saved(train: Callable[..., Fit], tmp_path: Path) -> None:
    state = train(epochs=1).loss_state
    assert save_loss(state, tmp_path) == ["loss.pt"]
    loss = build_objective(own_task("Centres"), load_loss(tmp_path)).loss
    assert isinstance(loss, Centres)
    assert torch.equal(loss.weight, state["weight"])


def test_an_instance_in_the_users_module_is_not_trained_by_one_training_for_the_next(data: Data) -> None:
    task = own_task("INSTANCE")
    before = INSTANCE.weight.detach().clone()
    config = TrainConfig(epochs=1, batch_size=8)
    fit(model(), data, config, objective=build_objective(task), seed=1)
    assert torch.equal(INSTANCE.weight, before)


def test_parameters_that_cannot_be_trained_are_refused_before_training() -> None:
    objective = Objective(Centres())
    with pytest.raises(StageError, match=r"strategy: 'fsdp' does not train the parameters of task\.loss; take 'ddp'"):
        trained_loss(objective, TrainConfig(strategy="fsdp"), by_another=False)
    own_step = Objective(Centres(), train_step=lambda model, batch: model(batch[0]).sum())
    with pytest.raises(StageError, match=r"task\.loss: it has parameters, which task\.train_step does not train"):
        trained_loss(own_step, TrainConfig(), by_another=False)


SCALE = nn.Parameter(torch.ones(()))
FROZEN = nn.Parameter(torch.ones(()), requires_grad=False)


class HalfHidden(Centres):
    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return SCALE * super().forward(outputs, targets)


@pytest.mark.parametrize("loss", [lambda outputs, targets: SCALE * outputs.square().mean(), HalfHidden()])
def test_parameters_that_a_loss_does_not_show_are_refused_before_training(
    train: Callable[..., Fit], loss: Callable[..., Tensor]
) -> None:
    with pytest.raises(StageError, match=r"task\.loss: it depends on parameters of the shapes \[\(\)\] that no optim"):
        train(objective=Objective(loss))
    train(objective=Objective(lambda outputs, targets: FROZEN * outputs.square().mean()), epochs=1)


def test_another_loss_in_training_leaves_the_tasks_as_it_was(train: Callable[..., Fit]) -> None:
    fitted = train(batch_loss=lambda outputs, batch: outputs.square().mean())
    assert fitted.loss_state == {}
