"""Losses that are means over samples, and losses that are sums with a weight."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from heliostat.errors import StageError
from heliostat.training.config import TrainConfig
from heliostat.training.evaluation import evaluate
from heliostat.training.loop import Fit, fit
from heliostat.training.losses import mean_of, summed
from heliostat.training.task import Objective
from heliostat.training.torch_losses import as_sum

WEIGHT = torch.tensor([0.1, 1.0, 4.0])


def labels(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 3, shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.3, -100, targets)


@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (functional.cross_entropy, labels(20)),
        (functional.cross_entropy, labels(20, 6)),
        (functional.nll_loss, labels(20, 6)),
        (nn.CrossEntropyLoss(), labels(20)),
        (nn.CrossEntropyLoss(weight=WEIGHT), labels(20, 6)),
        (nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.2, ignore_index=1), labels(20, 6).clamp(min=0)),
        (nn.CrossEntropyLoss(label_smoothing=0.2), labels(20)),
        (nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1), torch.rand(20, 3).softmax(1)),
        (nn.NLLLoss(weight=WEIGHT), labels(20)),
        (partial(functional.cross_entropy, weight=WEIGHT), labels(20)),
    ],
)
def test_a_loss_of_torch_as_sum_and_weight_is_its_own_mean(loss: Callable[..., Tensor], targets: Tensor) -> None:
    shape = (20, 3) if targets.is_floating_point() else (20, 3, *targets.shape[1:])
    outputs = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = as_sum(loss)
    assert found is not None
    total, weight = found(outputs, targets)
    torch.testing.assert_close(total / weight, loss(outputs, targets))


class OwnCrossEntropy(nn.CrossEntropyLoss):
    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 2 * super().forward(outputs, targets)


@pytest.mark.parametrize(
    "loss",
    [
        functional.mse_loss,
        nn.CrossEntropyLoss(reduction="sum"),
        partial(functional.cross_entropy, reduction="sum"),
        OwnCrossEntropy(),
    ],
)
def test_what_torch_does_not_divide_by_a_weight_stays_as_it_is(loss: Callable[..., Tensor]) -> None:
    assert as_sum(loss) is None


def token_mean(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    losses = (outputs - targets).abs()
    counted = targets > -1
    return (losses * counted).sum(), counted.sum()


def tokens(num_samples: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(num_samples)
    inputs = torch.randn(num_samples, 4, generator=generator)
    lengths = torch.randint(1, 5, (num_samples, 1), generator=generator)
    lengths[: num_samples // 4] = 0
    return TensorDataset(inputs, torch.where(torch.arange(4) < lengths, inputs.abs(), -5))


def train(objective: Objective, **options: Any) -> Fit:
    torch.manual_seed(0)
    config = TrainConfig(
        **{"epochs": 2, "batch_size": 8, "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}, **options}
    )
    return fit(nn.Linear(4, 4), {"train": tokens(21), "val": tokens(9)}, config, objective=objective, seed=1)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("parts", [3, 8])
def test_sums_and_weights_train_the_same_in_any_number_of_parts(parts: int, precision: str) -> None:
    """Eight parts of a batch of eight: some have nothing that counts, whose mean would be no number."""
    whole = train(Objective(token_mean), precision=precision, clip_grad_norm=0.5)
    in_parts = train(Objective(token_mean), precision=precision, clip_grad_norm=0.5, accumulate_steps=parts)
    tolerance = 1e-5 if precision == "fp32" else 2e-3
    torch.testing.assert_close(in_parts.state, whole.state, rtol=0, atol=tolerance)
    for row, expected in zip(in_parts.history, whole.history, strict=True):
        assert row["train_loss"] == pytest.approx(expected["train_loss"], abs=tolerance)


def test_the_loss_of_a_split_is_its_sum_by_its_weight_in_batches_of_any_size() -> None:
    data, model = tokens(21), nn.Linear(4, 4)
    total, weight = token_mean(model(data.tensors[0]), data.tensors[1])
    for batch_size in (1, 4, 100):
        found = evaluate(model, data, Objective(token_mean), split="val", batch_size=batch_size)
        assert found["val_loss"] == pytest.approx((total / weight).item(), rel=1e-6)


def test_a_global_batch_without_weight_changes_nothing_and_a_split_without_any_is_refused() -> None:
    nothing = Objective(lambda outputs, targets: (outputs.sum() * 0, 0))
    assert mean_of((torch.tensor(0.0), 0)).item() == 0.0
    with pytest.raises(StageError, match="every training sample has the weight 0"):
        train(nothing)
    with pytest.raises(StageError, match="every val sample has the weight 0"):
        evaluate(nn.Linear(4, 4), tokens(9), nothing, split="val")


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (torch.zeros(3), r"the shape \(3,\); return one number, or \(sum, weight\)"),
        ({"loss": torch.zeros(())}, r"the loss is a dict; return a tensor, or a pair of tensors \(sum, weight\)"),
        (0.5, "the loss is a float"),
    ],
)
def test_what_is_no_loss_is_named(loss: Any, message: str) -> None:
    with pytest.raises(StageError, match=message):
        summed(loss, 4)
