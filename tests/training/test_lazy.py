"""Lazy layers have their sizes before anything looks at them."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from heliostat.errors import StageError
from heliostat.training.config import TrainConfig
from heliostat.training.lazy import materialize
from heliostat.training.loop import fit
from heliostat.training.strategies.forecast import on_meta
from heliostat.training.task import Objective

Data = Mapping[str, Dataset[Any]]


class Branched(nn.Module):
    """Lazy layers, one of them in a branch that only training has."""

    def __init__(self, spare: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.LazyLinear(16), nn.LazyBatchNorm1d(), nn.ReLU())
        self.classify, self.auxiliary = nn.LazyLinear(3), nn.LazyLinear(3)
        if spare:
            self.spare = nn.LazyLinear(3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.body(inputs)
        return self.classify(hidden) + (0.1 * self.auxiliary(hidden) if self.training else 0)


def test_lazy_layers_train_with_averaged_weights_and_every_parameter_moves(data: Data, objective: Objective) -> None:
    model = Branched()
    config = TrainConfig(epochs=2, batch_size=8, ema_decay=0.5, clip_grad_norm=1.0)
    fitted = fit(model, data, config, objective=objective, seed=1)
    new = Branched()
    new.load_state_dict(fitted.state)
    assert new.eval()(torch.zeros(2, 8)).shape == (2, 3)
    untrained = Branched()
    materialize(untrained, lambda: torch.zeros(2, 8))
    moved = dict(untrained.named_parameters())
    assert moved.keys() == dict(model.named_parameters()).keys()
    assert all(not torch.equal(fitted.state[name], parameter) for name, parameter in moved.items())


def test_the_passes_that_give_sizes_leave_statistics_and_mode_alone() -> None:
    model = Branched()
    materialize(model, lambda: 5 + torch.randn(4, 8))
    assert model.training
    assert torch.equal(model.body[1].running_mean, torch.zeros(16))  # type: ignore[arg-type]
    assert model.body[1].num_batches_tracked == 0


def test_a_lazy_layer_that_is_never_called_is_named() -> None:
    with pytest.raises(StageError, match="the lazy layers spare are not called by its forward; remove them"):
        materialize(Branched(spare=True), lambda: torch.zeros(2, 8))


def test_a_model_that_fails_on_its_first_inputs_is_an_error_that_names_its_lazy_layers() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(3))
    with pytest.raises(StageError, match=r"task.model: 0, 2 cannot get their sizes.*2 samples"):
        materialize(model, lambda: torch.zeros(2, 8))


def test_a_preview_says_that_the_sizes_of_lazy_layers_are_known_when_they_train() -> None:
    found = on_meta(lambda: nn.Sequential(nn.LazyLinear(3)), TrainConfig())
    assert found == "known when it trains (the data says the sizes of 0)"
