"""The averaged weights that are validated are the weights that are saved, however the module holds its parameters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.data import Dataset

from heliostat.training.checkpoints import Checkpoints
from heliostat.training.config import TrainConfig
from heliostat.training.ema import Ema
from heliostat.training.evaluation import evaluate
from heliostat.training.loop import fit
from heliostat.training.task import Objective


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        self.second.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.head(torch.tanh(self.second(torch.tanh(self.first(inputs)))))
        return outputs


def tied_and_partly_frozen() -> nn.Module:
    model = Tied()
    model.first.bias.requires_grad_(False)
    model.head.weight.requires_grad_(False)
    return model


def tied_and_frozen() -> nn.Module:
    model = Tied()
    model.first.weight.requires_grad_(False)
    return model


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def tied_through_a_parametrization() -> nn.Module:
    model = Tied()
    for layer in (model.first, model.second):
        parametrize.register_parametrization(layer, "weight", Doubled())
    second: Any = model.second
    second.parametrizations.weight.original = model.first.parametrizations.weight.original  # type: ignore[union-attr]
    return model


def weight_norm() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 3))


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


BUILDERS = [Tied, tied_and_partly_frozen, tied_and_frozen, tied_through_a_parametrization, weight_norm, batch_norm]


def build(builder: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return builder()


@pytest.mark.parametrize("builder", BUILDERS, ids=lambda builder: builder.__name__)
def test_the_saved_average_evaluates_to_the_validated_figures_also_after_an_interruption(
    data: dict[str, Dataset[Any]], objective: Objective, tmp_path: Path, builder: Callable[[], nn.Module]
) -> None:
    def train(epochs: int, checkpoints: Checkpoints | None) -> Any:
        options: dict[str, Any] = {"ema_decay": 0.9, "optimizer": {"name": "adam", "lr": 0.05}}
        config = TrainConfig(epochs=epochs, batch_size=8, monitor="val_loss", **options)
        return fit(build(builder), data, config, objective=objective, seed=1, checkpoints=checkpoints)

    train(1, Checkpoints(tmp_path))
    resumed = train(1, Checkpoints(tmp_path))  # nothing is left to train: the weights come from the checkpoint
    for fitted in (train(1, None), resumed, train(3, None)):
        model = build(builder)
        model.load_state_dict(fitted.state)
        kept = evaluate(model, data["val"], objective, split="val")
        assert kept["val_loss"] == pytest.approx(fitted.metrics["val_loss"], rel=1e-6)


def test_an_average_is_known_under_every_name_of_a_tied_parameter() -> None:
    ema = Ema(tied_and_partly_frozen(), 0.9)
    named = ema.under_every_name(ema.average)
    assert set(named) == {"first.weight", "second.weight", "second.bias", "head.bias"}
    assert named["first.weight"] is named["second.weight"]
