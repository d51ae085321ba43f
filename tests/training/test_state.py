"""Copies of a state dict take memory only as long as they are used."""

import gc
import weakref

import torch

from heliostat.core.state import map_tensors


def test_a_copied_state_is_freed_with_its_last_reference_and_not_by_the_garbage_collector():
    gc.disable()
    try:
        copied = map_tensors({"model": {"weight": torch.ones(3)}, "steps": [1, torch.zeros(2)]}, torch.clone)
        kept = [weakref.ref(copied["model"]["weight"]), weakref.ref(copied["steps"][1])]
        del copied
        assert [reference() for reference in kept] == [None, None]
    finally:
        gc.enable()
