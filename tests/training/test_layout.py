"""Channels-last layout must not be seen: neither by what fails in it nor by what computes something else in it."""

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from heliostat.training import loop
from heliostat.training.checkpoints import Checkpoints
from heliostat.training.config import OptimizerConfig, TrainConfig
from heliostat.training.layout import Layout, choose_layout
from heliostat.training.loop import fit
from heliostat.training.losses import LossRule
from heliostat.training.optim import build_optimizer
from heliostat.training.progress import Fit
from heliostat.training.task import Metric, Objective
from heliostat.training.world import World

CPU = torch.device("cpu")


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    return float((outputs.argmax(1) == targets).double().mean())


@pytest.fixture
def images() -> dict[str, Any]:
    targets = torch.arange(24) % 3
    inputs = torch.randn(24, 2, 6, 6, generator=torch.Generator().manual_seed(0)) + targets.view(-1, 1, 1, 1)
    return {"train": TensorDataset(inputs, targets), "val": TensorDataset(inputs[:9], targets[:9])}


class Net(nn.Module):
    """A convolution, batch norm and a classifier; `between` sees the maps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.classify = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.classify(self.between(self.norm(self.conv(inputs)).relu()).mean((2, 3)))

    def between(self, maps: Tensor) -> Tensor:
        return maps


def train(model: nn.Module, images: dict[str, Any], **options: Any) -> Fit:
    objective = Objective(options.pop("loss", nn.functional.cross_entropy), (Metric("accuracy", accuracy, "max"),))
    checkpoints, train_step = options.pop("checkpoints", None), options.pop("train_step", None)
    if train_step is not None:
        objective = Objective(objective.loss, objective.metrics, train_step=train_step)
    config = TrainConfig(**{"epochs": 3, "batch_size": 8, "optimizer": {"name": "sgd", "lr": 0.05}, **options})
    return fit(model, images, config, objective=objective, seed=1, checkpoints=checkpoints)


def trained_in_plain_layout(
    model: nn.Module, images: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **options: Any
) -> Fit:
    with monkeypatch.context() as patch:
        patch.setattr(loop, "choose_layout", lambda model, *_, **__: Layout(model))
        return train(model, images, **options)


def assert_close(one: Fit, other: Fit) -> None:
    for row, expected in zip(one.history, other.history, strict=True):
        assert row["train_loss"] == pytest.approx(expected["train_loss"], abs=1e-4)
        assert row["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-4)
    for name, tensor in one.state.items():
        torch.testing.assert_close(tensor, other.state[name], rtol=1e-3, atol=1e-4)


class FromTheSecondEpoch(Net):
    """Calls `view` on its maps after three steps, in training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def between(self, maps: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
            if self.steps > 3:
                return maps.view(len(maps), -1).view_as(maps)
        return maps


class InLaterEvaluations(Net):
    """Calls `view` on its maps from the second evaluation on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def between(self, maps: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        elif self.steps > 3:
            return maps.view(len(maps), -1).view_as(maps)
        return maps


class ReadsStrides(Net):
    """Reads its maps as they lie in memory: no error in channels-last layout, but other numbers."""

    def between(self, maps: Tensor) -> Tensor:
        _, channels, height, width = maps.shape
        return maps.as_strided(maps.shape, (channels * height * width, height * width, width, 1)) * torch.arange(
            4
        ).view(1, 4, 1, 1)


class BackwardByView(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, maps: Tensor) -> Tensor:
        return maps.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        return gradient.view(len(gradient), -1).view_as(gradient)


class FailsInBackward(Net):
    def between(self, maps: Tensor) -> Tensor:
        return BackwardByView.apply(self.norm(self.conv(maps[:, :2]))) if self.training else maps  # type: ignore[no-any-return, no-untyped-call]


class AssertsPlainLayout(Net):
    def between(self, maps: Tensor) -> Tensor:
        assert maps.is_contiguous(), "a kernel of one's own reads it"
        return maps


@pytest.mark.parametrize(
    "kind", [FromTheSecondEpoch, InLaterEvaluations, ReadsStrides, FailsInBackward, AssertsPlainLayout]
)
def test_a_model_that_needs_plain_layout_trains_as_it_does_there(
    kind: type[Net], images: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_close(train(kind(), images), trained_in_plain_layout(kind(), images, monkeypatch))


def test_a_hook_that_calls_view_sends_the_model_to_plain_layout(images: dict[str, Any]) -> None:
    model = Net()
    model.conv.register_forward_hook(lambda module, inputs, maps: maps.view(len(maps), -1).view_as(maps))
    assert len(train(model, images).history) == 3


class ByView(torch.optim.SGD):
    """As optimizers that look at gradients as matrices are written."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.view(len(parameter), -1)
        super().step()


def test_an_optimizer_of_ones_own_that_calls_view_on_gradients_runs(images: dict[str, Any]) -> None:
    options = {"optimizer": {"name": f"{__name__}:ByView"}}
    assert len(train(Net(), images, **options).history) == 3


def test_a_train_step_that_calls_view_on_outputs_or_weights_runs(images: dict[str, Any]) -> None:
    def step(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        penalty = sum(parameter.view(-1).square().sum() for parameter in model.parameters())
        return nn.functional.cross_entropy(model(batch[0]), batch[1]) + 1e-4 * penalty

    assert len(train(Net(), images, train_step=step).history) == 3


def test_a_convolutional_net_is_still_trained_in_channels_last_layout() -> None:
    model = Net()
    batch = (torch.randn(4, 2, 6, 6), torch.arange(4) % 3)
    assert choice(model, batch).is_fast
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)


def choice(model: nn.Module, batch: tuple[Tensor, ...]) -> Layout:
    rule = LossRule(lambda outputs, batch: nn.functional.cross_entropy(outputs, batch[1]), precision="fp32", device=CPU)
    return choose_layout(model, lambda: batch, rule=rule, optimizer=OptimizerConfig(), world=World())


class Counts(Net):
    """Has state of its own, and random numbers of all three generators in training."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def between(self, maps: Tensor) -> Tensor:
        self.calls += 1
        return maps * (1 + 0 * random.random()) + 0 * torch.rand(()) if self.training else maps


def test_trying_the_layouts_changes_nothing() -> None:
    model, batch = Counts().eval(), (torch.randn(4, 2, 6, 6), torch.arange(4) % 3)
    before = copy.deepcopy(model.state_dict())
    states = torch.get_rng_state(), random.getstate()
    assert choice(model, batch).is_fast
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.training
    assert model.calls == 0
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_a_model_that_cannot_be_copied_trains_in_plain_layout(images: dict[str, Any]) -> None:
    model = Net()
    nn.utils.weight_norm(model.conv)
    assert len(train(model, images).history) == 3


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "adagrad"])
def test_a_run_that_resumes_in_another_layout_goes_on_the_same(
    name: str, images: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's fused kernels read parameter and state as memory: the checkpoint's layout must not stay."""
    optimizer = {"name": name, "lr": 0.05, **({"momentum": 0.9} if name == "sgd" else {})}
    checkpoints = Checkpoints(tmp_path)
    train(Net(), images, epochs=2, optimizer=optimizer, checkpoints=checkpoints)
    resumed = trained_in_plain_layout(
        Net(), images, monkeypatch, epochs=4, optimizer=optimizer, checkpoints=checkpoints
    )
    assert_close(resumed, train(Net(), images, epochs=4, optimizer=optimizer))


def test_a_parameter_with_gaps_in_memory_is_trained_as_torch_trains_it_by_default() -> None:
    """The fused kernels would read the gaps silently."""

    def trained(make: Callable[[nn.Parameter], torch.optim.Optimizer]) -> Tensor:
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.randn(4, 6)[:, :3])
        optimizer = make(parameter)
        for _ in range(3):
            parameter.grad = torch.randn(4, 3)
            optimizer.step()
        return parameter.detach()

    ours = trained(lambda parameter: build_optimizer([parameter], OptimizerConfig(lr=0.1)))
    torch.testing.assert_close(ours, trained(lambda parameter: torch.optim.Adam([parameter], lr=0.1)))
