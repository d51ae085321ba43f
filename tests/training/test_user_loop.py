"""A user's own `train_fn`. The functions of this module are that user's code; `mine:…` finds them."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from heliostat.errors import StageError
from heliostat.training.checkpoints import Checkpoints
from heliostat.training.config import TrainConfig
from heliostat.training.progress import Fit
from heliostat.training.run import run_training
from heliostat.training.user_loop import TrainContext
from heliostat.training.world import World


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])


def train(name: str, *, loss: str = "torch.nn.functional:cross_entropy", **options: Any) -> Fit:
    task: Any = SimpleNamespace(train_fn=f"mine:{name}", train_step=None, loss=loss, metrics=())
    config = options.pop("config", TrainConfig(epochs=5, batch_size=4))
    return run_training(task, config, world=World(), seed=0, **options)


def complete(context: TrainContext, config: TrainConfig) -> None:
    """A loop with all there is: spread, restore, report."""
    model: nn.Module = nn.Linear(4, config.model_args.get("classes", 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    start = 0
    if (checkpoint := context.restore()) is not None:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        start = checkpoint["epoch"]
    generator = torch.Generator().manual_seed(0)
    dataset = TensorDataset(torch.randn(12, 4, generator=generator), torch.arange(12) % 2)
    model, loader = context.prepare(model, DataLoader(dataset, batch_size=config.batch_size))
    for epoch in range(start + 1, config.epochs + 1):
        total = 0.0
        for inputs, targets in loader:
            loss = nn.functional.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
        context.report({"val_loss": total}, checkpoint=state)


FIGURES = [0.5, 0.2, 0.9, 0.4, 0.3]


def scripted(context: TrainContext, config: TrainConfig) -> None:
    for epoch, figure in enumerate(FIGURES, start=1):
        context.report({"val_loss": figure, "score": figure}, checkpoint={"weight": torch.tensor(float(epoch))})


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.scale * (outputs - targets).square().mean()


def with_loss(context: TrainContext, config: TrainConfig) -> None:
    context.restore()
    for epoch, figure in enumerate(FIGURES, start=1):
        state = {"model": {"weight": torch.ones(())}, "loss": {"scale": torch.tensor(float(epoch))}}
        context.report({"val_loss": figure}, checkpoint=state)


def test_a_checkpoint_holds_the_parameters_of_the_loss_that_the_loop_trained(tmp_path: Path) -> None:
    for fitted in (train("with_loss", loss="mine:Scaled", checkpoints=Checkpoints(tmp_path)) for _ in range(2)):
        assert fitted.loss_state == {"scale": torch.tensor(2.0)}
    with pytest.raises(StageError, match=r"task\.loss has parameters, which a reported checkpoint must hold too"):
        train("scripted", loss="mine:Scaled")


def cautious(context: TrainContext, config: TrainConfig) -> None:
    try:
        scripted(context, config)
    except Exception:
        pytest.fail("stopping early is no error of the loop")


def only_metrics(context: TrainContext, config: TrainConfig) -> None:
    for figure in FIGURES:
        context.report({"val_loss": figure})


def metrics_nobody_asked_for(context: TrainContext, config: TrainConfig) -> None:
    for epoch in (1, 2):
        context.report({"reward": 1.0 / epoch}, checkpoint={"weight": torch.tensor(float(epoch))})


def silent(context: TrainContext, config: TrainConfig) -> None:
    pass


def pickled_object(context: TrainContext, config: TrainConfig) -> None:
    context.report({"val_loss": 1.0}, checkpoint={"model": {"weight": torch.zeros(1)}, "paths": [Path("/")]})


def whole_module(context: TrainContext, config: TrainConfig) -> None:
    context.report({"val_loss": 1.0}, checkpoint={"network": {"weight": torch.zeros(1)}})


def test_the_best_reported_checkpoint_is_the_result() -> None:
    result = train("scripted")
    assert (result.epoch, result.epochs, result.metrics["val_loss"]) == (2, 5, 0.2)
    assert result.state["weight"].item() == 2.0


def test_any_reported_metric_can_be_the_monitor() -> None:
    assert train("scripted", config=TrainConfig(monitor="score")).epoch == 3


def test_without_the_default_metric_the_last_checkpoint_is_the_result() -> None:
    assert train("metrics_nobody_asked_for").epoch == 2


def test_a_monitor_that_is_not_reported_names_the_nearest() -> None:
    with pytest.raises(StageError, match="does not report 'scores'; did you mean 'score'"):
        train("scripted", config=TrainConfig(monitor="scores"))


def test_stopping_early_ends_the_loop_as_if_it_had_returned() -> None:
    assert train("cautious", on_epoch=lambda epoch, row: epoch == 3).epochs == 3


def test_an_interrupted_loop_goes_on_from_its_checkpoint_to_the_same_result(tmp_path: Path) -> None:
    def interrupt(epoch: int, row: Any) -> None:
        if epoch == 3:
            raise KeyboardInterrupt

    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train("complete", checkpoints=checkpoints, on_epoch=interrupt)
    epochs: list[int] = []
    resumed = train("complete", checkpoints=checkpoints, on_epoch=lambda epoch, row: epochs.append(epoch))
    uninterrupted = train("complete")
    assert epochs == [3, 4, 5]
    assert [row["val_loss"] for row in resumed.history] == [row["val_loss"] for row in uninterrupted.history]
    assert all(torch.equal(resumed.state[name], tensor) for name, tensor in uninterrupted.state.items())


def test_a_finished_loop_returns_its_result_again(tmp_path: Path) -> None:
    first = train("complete", checkpoints=Checkpoints(tmp_path))
    again = train("complete", checkpoints=Checkpoints(tmp_path))
    assert again.history == first.history
    assert torch.equal(again.state["weight"], first.state["weight"])


def test_a_loop_that_was_told_to_stop_goes_on_when_it_is_taken_up(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    assert train("complete", checkpoints=checkpoints, on_epoch=lambda epoch, row: epoch == 2).epochs == 2
    assert train("complete", checkpoints=checkpoints).history[2:] != []


def test_a_trial_needs_no_checkpoint_but_a_model_does() -> None:
    trial = train("only_metrics", require_checkpoint=False)
    assert (trial.epoch, trial.state) == (2, {})
    with pytest.raises(StageError, match="reported no checkpoint, so there is no model to keep"):
        train("only_metrics")


def test_a_loop_that_reports_nothing_is_told_how() -> None:
    with pytest.raises(StageError, match=r"reported nothing; call context\.report"):
        train("silent")


def test_a_checkpoint_that_could_not_be_read_back_is_refused_at_once() -> None:
    with pytest.raises(StageError, match=r"checkpoint\['paths'\]\[0\] is a PosixPath"):
        train("pickled_object")


def test_a_checkpoint_without_the_models_state_is_refused() -> None:
    with pytest.raises(StageError, match="with the state dict as 'model'"):
        train("whole_module")
