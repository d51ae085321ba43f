"""Batch norm trains where a single sample would be left over; several workers: `tests/training/test_ddp.py`."""

from collections.abc import Callable

from heliostat.training.progress import Fit


def test_batch_norm_trains_with_one_sample_left_over_and_in_parts_of_one(
    train_stages: Callable[[str], dict[str, Fit]],
) -> None:
    fits = train_stages("bn_leftover/pipeline.yaml")
    assert all("batches" in fit.notes for fit in fits.values())
