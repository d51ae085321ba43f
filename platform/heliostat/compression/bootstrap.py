"""How sure a figure is: where it would lie had the split been other samples of the same kind."""

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

RESAMPLES = 200
CONFIDENCE = 0.95
TRIED = 5
LIMIT_S = 20.0
"""A metric that would take longer for all resamples, by the first few, has no interval."""


class NoIntervalError(Exception):
    """Why a figure has no interval."""


def confidence_interval(
    metric: Callable[[Tensor, Tensor], float], outputs: Tensor, targets: Tensor
) -> tuple[float, float]:
    """The ends of the 95 % interval of `metric(outputs, targets)`, by the percentile bootstrap (Efron 1979).

    The samples are drawn with replacement, and the same ones for every model: what two intervals differ by is due to
    the models. Draws for which the metric is not a number are left out. Raises NoIntervalError for a metric that is too
    slow, fails on a draw, where a class may be missing, or is never a number.
    """
    generator = torch.Generator().manual_seed(0)
    figures, started = [], time.monotonic()
    for number in range(1, RESAMPLES + 1):
        rows = torch.randint(len(targets), (len(targets),), generator=generator)
        try:
            figures.append(float(metric(outputs[rows], targets[rows])))
        except Exception as error:  # a user's metric may raise anything
            raise NoIntervalError(f"it fails on resample {number}: {type(error).__name__}: {error}") from error
        if number == TRIED and (time.monotonic() - started) * RESAMPLES / TRIED > LIMIT_S:
            raise NoIntervalError(f"{RESAMPLES} resamples would take over {LIMIT_S:g} s")
    if np.isnan(figures).all():
        raise NoIntervalError("it is not a number on any resample")
    low, high = np.nanpercentile(figures, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
    return float(low), float(high)
