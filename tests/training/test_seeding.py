import random

import numpy as np
import torch

from heliostat.training.seeding import derive_seed, fresh_process_state, seed_everything


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_a_seed_sets_all_three_generators() -> None:
    seed_everything(3)
    first = draw()
    seed_everything(3)
    assert draw() == first
    seed_everything(4)
    assert draw() != first


def test_seeds_of_epochs_and_ranks_are_all_different() -> None:
    seeds = {derive_seed(seed, epoch, rank) for seed in range(5) for epoch in range(20) for rank in range(4)}
    assert len(seeds) == 400


def test_nothing_that_a_trial_left_behind_reaches_the_next() -> None:
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    torch.autograd.set_detect_anomaly(True)
    torch.set_autocast_enabled("cpu", True)
    torch.set_autocast_dtype("cpu", torch.float16)
    torch.backends.cudnn.benchmark = True

    fresh_process_state(num_threads=1)

    assert torch.is_grad_enabled()
    made = torch.ones(2, 2)
    assert (made.dtype, made.device.type) == (torch.float32, "cpu")
    assert torch.get_num_threads() == 1
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.is_anomaly_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert torch.get_autocast_dtype("cpu") is torch.bfloat16
    assert (made @ made).dtype is torch.float32
    assert not torch.backends.cudnn.benchmark
