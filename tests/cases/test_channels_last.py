"""Networks, losses and metrics that run in plain layout alone train here as they do in plain torch."""

import math
from collections.abc import Callable

import pytest

from heliostat.training.progress import Fit


def test_models_that_plain_layout_alone_can_run_train(train_stages: Callable[[str], dict[str, Fit]]) -> None:
    fits = train_stages("channels_last/pipeline.yaml")
    assert set(fits) == {"segmentation", "condition", "video", "branch", "flat"}
    assert all(math.isfinite(fit.metrics["val_loss"]) for fit in fits.values())


@pytest.mark.parametrize("file", ["pipeline.yaml", "metric.yaml"])
def test_a_loss_or_metric_that_calls_view_on_dense_outputs_runs(
    file: str, train_stages: Callable[[str], dict[str, Fit]]
) -> None:
    assert math.isfinite(train_stages(f"view/{file}")["train"].metrics["val_loss"])
