"""Randomness that depends on the seed alone.

Nothing draws from a stream that runs through the whole training: each epoch derives its own seed from (seed, epoch,
rank), so that an epoch is the same whether or not the run was interrupted before it.
"""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(seed: int, *path: int) -> int:
    """An independent seed for a part of a run, such as `derive_seed(seed, epoch, rank)`."""
    return int(np.random.SeedSequence((seed, *path)).generate_state(1)[0])


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def keep_randomness() -> Callable[[], None]:
    """Return a function that puts the global generators of Python, NumPy and torch (CPU) back to where they are now."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def put_back() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)

    return put_back


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Within it torch refuses operations whose result depends on the order of threads, if enabled.

    cuBLAS must be told before its first call (https://docs.nvidia.com/cuda/cublas/#results-reproducibility).
    """
    if not enabled:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
