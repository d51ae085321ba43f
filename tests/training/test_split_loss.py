"""A loss that is no mean over samples is refused where batches are split, unless the config accepts it."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from heliostat.errors import StageError
from heliostat.training.config import TrainConfig
from heliostat.training.loop import Fit, fit
from heliostat.training.losses import Loss
from heliostat.training.task import Objective


def rows(num_samples: int, *, padded: int = 3) -> TensorDataset:
    generator = torch.Generator().manual_seed(num_samples)
    inputs = torch.randn(num_samples, 4, generator=generator)
    targets = torch.randint(0, 3, (num_samples, 2), generator=generator)
    targets[torch.rand(num_samples, generator=generator) < 0.5, 1] = padded
    return TensorDataset(inputs, targets)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(4, 6), nn.Dropout(0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.dropout(self.layer(inputs)).view(-1, 3, 2)
        return outputs


def train(objective: Objective, train_data: Dataset[Any] | None = None, **options: Any) -> Fit:
    torch.manual_seed(0)
    config = TrainConfig(**{"epochs": 1, "batch_size": 8, "accumulate_steps": 4, **options})
    data = {"train": train_data or rows(24), "val": rows(9)}
    return fit(Tokens(), data, config, objective=objective, seed=1)


def token_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, ignore_index=3)


def class_weights(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets.clamp(max=2), weight=torch.tensor([0.1, 1.0, 5.0]))


def dice(outputs: Tensor, targets: Tensor) -> Tensor:
    found, wanted = outputs.softmax(1)[:, 0], (targets == 0).float()
    return 1 - 2 * (found * wanted).sum() / (found.sum() + wanted.sum())


def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
    rows = functional.normalize(outputs.flatten(1))
    return functional.cross_entropy(rows @ rows.T, torch.arange(len(rows)))


def total(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, ignore_index=3, reduction="sum")


def mean_called_sum(outputs: Tensor, targets: Tensor) -> Loss:
    """A mistake: the first is a mean already."""
    return token_mean(outputs, targets), (targets != 3).sum()


@pytest.mark.parametrize("loss", [token_mean, class_weights, dice, contrastive, total, mean_called_sum])
def test_a_loss_that_is_no_mean_over_samples_is_refused_before_training_with_both_figures(
    loss: Callable[..., Any],
) -> None:
    calls: list[int] = []

    def counted(outputs: Tensor, targets: Tensor) -> Loss:
        calls.append(outputs.requires_grad)
        found: Loss = loss(outputs, targets)
        return found

    message = r"task\.loss: .* \(\S+ for a whole batch, \S+ from its 4 parts\).*return the sum and its weight"
    with pytest.raises(StageError, match=message):
        train(Objective(counted))
    assert not any(calls)
    accepted = train(Objective(loss), split_loss="average")
    assert "the curve depends on how batches are split" in accepted.notes["split_loss"]
    assert not train(Objective(loss), accumulate_steps=1).notes


def summed(outputs: Tensor, targets: Tensor) -> Loss:
    return total(outputs, targets), (targets != 3).sum()


def elementwise(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.mse_loss(outputs, targets[:, None].float().expand_as(outputs))


def per_sample_then_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    losses = functional.cross_entropy(outputs, targets, ignore_index=3, reduction="none")
    return (losses.sum(1) / (targets != 3).sum(1)).mean()


@pytest.mark.parametrize("loss", [summed, elementwise, per_sample_then_mean, nn.CrossEntropyLoss(ignore_index=3)])
def test_a_mean_over_samples_or_a_sum_with_its_weight_trains_in_parts(loss: Callable[..., Loss]) -> None:
    assert not train(Objective(loss)).notes


def test_a_mean_over_nothing_in_one_part_is_refused() -> None:
    """A part of two samples without a token that counts: its mean is no number."""
    data = rows(24)
    data.tensors[1][:20] = 3
    with pytest.raises(StageError, match="nan from its 4 parts"):
        train(Objective(token_mean), data)


def test_the_check_leaves_the_random_numbers_and_the_loss_as_they_were() -> None:
    """The model has dropout, and the loss counts its calls."""

    class Counting(nn.Module):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            self.calls += self.training
            return elementwise(outputs, targets)

    def state(**options: Any) -> dict[str, Tensor]:
        return train(Objective(Counting()), steps_per_epoch=1, **options).state

    one, other = state(), state(split_loss="average")
    assert all(torch.equal(one[name], other[name]) for name in one)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(list(zip(*rows(24).tensors)))


def test_a_stream_is_looked_at_too() -> None:
    with pytest.raises(StageError, match="the loss is no mean over samples"):
        train(Objective(token_mean), Stream())


def test_the_users_own_step_is_looked_at_in_evaluation_mode() -> None:
    objective = Objective(summed, train_step=lambda model, batch: token_mean(model(batch[0]), batch[1]))
    with pytest.raises(StageError, match=r"task\.train_step: the loss is no mean over samples"):
        train(objective)
    assert not train(Objective(summed, train_step=lambda model, batch: summed(model(batch[0]), batch[1]))).notes


def test_a_step_that_is_random_or_needs_gradients_trains_with_a_note() -> None:
    def noisy(model: nn.Module, batch: tuple[Any, ...]) -> Loss:
        return summed(model(batch[0] + torch.randn_like(batch[0])), batch[1])

    def penalized(model: nn.Module, batch: tuple[Any, ...]) -> Tensor:
        inputs = batch[0].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(inputs).square().sum(), inputs, create_graph=True)
        return elementwise(model(batch[0]), batch[1]) + gradient.square().mean()

    assert "draws random numbers" in train(Objective(summed, train_step=noisy)).notes["split_loss"]
    assert "nothing is checked" in train(Objective(summed, train_step=penalized)).notes["split_loss"]
