"""Complex weights train as they do in torch, whose fused kernels do not take them."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from heliostat.core.imports import resolve
from heliostat.training.progress import Fit
from heliostat.training.seeding import seed_everything

OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01),
}


def test_complex_weights_train_as_in_a_loop_written_by_hand(train_stages: Callable[[str], dict[str, Fit]]) -> None:
    """With one batch an epoch the order of samples does not matter."""
    fits = train_stages("complex/pipeline.yaml")
    assert fits["adam"].state["weights"].is_complex()
    inputs, targets = resolve("task:build_data")()["train"][:]
    for name, make in OPTIMIZERS.items():
        seed_everything(0)
        model = resolve("task:build_model")()
        optimizer = make(model.parameters())
        for row in fits[name].history:
            loss = nn.functional.mse_loss(model(inputs), targets)
            assert row["train_loss"] == pytest.approx(loss.item(), rel=1e-5)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
