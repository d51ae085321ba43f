"""The memory that training takes is estimated before it starts, close to what the processes then hold."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from heliostat.training.config import OPTIMIZERS, OptimizerConfig
from heliostat.training.losses import LossRule
from heliostat.training.memory import activations, estimate, optimizer_tensors, tried_optimizer_tensors

WORKER = Path(__file__).with_name("memory_worker.py")
WORKERS = 2
MODELS = ["mlp", "cnn", "transformer"]


def figures(name: str, optimizer: str, folder: Path) -> dict[str, Any]:
    """What rank 0 held at most, and what had been estimated, in megabytes."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once
    workers = [
        subprocess.Popen([sys.executable, str(WORKER), name, optimizer, str(rank), str(folder)], env=environment)
        for rank in range(WORKERS)
    ]
    try:
        assert [worker.wait(timeout=120) for worker in workers] == [0] * WORKERS
    finally:
        for worker in workers:
            worker.kill()
    found: dict[str, Any] = json.loads((folder / "figures.json").read_text())
    return found


@pytest.mark.parametrize("name", [MODELS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS[1:])])
@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("sgd", marks=pytest.mark.slow)])
def test_the_estimate_is_within_a_quarter_of_what_a_worker_holds(tmp_path: Path, name: str, optimizer: str) -> None:
    found = figures(name, optimizer, tmp_path)
    assert found["estimated"] == pytest.approx(found["measured"], rel=0.25)


def rule() -> LossRule:
    def loss(outputs: torch.Tensor, batch: tuple[Any, ...]) -> torch.Tensor:
        return nn.functional.mse_loss(outputs, batch[1])

    return LossRule(loss, precision="fp32", device=torch.device("cpu"))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_activations_are_what_autograd_keeps_for_each_sample(device: str) -> None:
    """The batch, the output of the ReLU, which the next layer keeps as well, and the outputs for the loss."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).to(device)
    batch = (torch.ones(1, 4, device=device), torch.ones(1, 2, device=device))
    found = activations(model, batch, rule())
    assert (found.fixed, found.per_sample, found.transient) == (0, 4 * (4 + 2 + 8 + 2), 2 * 4 * 8)
    assert found.of(10) == 10 * 4 * (16 + 16)


def test_measuring_leaves_the_model_and_the_generators_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2), nn.Dropout(0.5)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    activations(model, (torch.ones(1, 4), torch.ones(1, 2)), rule())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert not model.training


@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_known_of_an_optimizer_is_what_a_step_of_it_shows(name: str, momentum: float | None) -> None:
    config = OptimizerConfig(name=name, momentum=momentum if "momentum" in OPTIMIZERS[name] else None)
    assert optimizer_tensors(config) == tried_optimizer_tensors(config)


def test_what_another_optimizer_keeps_is_seen_in_a_step_of_it() -> None:
    assert optimizer_tensors(OptimizerConfig(name="torch.optim:Adamax")) == 2


def test_frozen_parameters_have_no_gradient_and_a_shared_one_counts_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    found = estimate(model, OptimizerConfig(name="adam"), averaged=True, activations=None)
    assert (found.parameters, found.trainable, found.optimizer) == (128, 64, 192)
    held = found.replicated(8, on_cpu=False)
    assert (held.activations, held.total) == (None, 128 + 64 + 192)
