import numpy as np
import pytest
import torch

from heliostat.compression import bootstrap
from heliostat.compression.bootstrap import NoIntervalError, confidence_interval


def accuracy(outputs, targets):
    return (outputs == targets).float().mean().item()


def test_the_interval_is_that_of_a_binomial_and_narrows_with_the_number_of_samples():
    for count, width in ((100, 0.157), (10_000, 0.0157)):  # 2 * 1.96 * sqrt(0.8 * 0.2 / count)
        outputs = torch.zeros(count)
        targets = (torch.arange(count) % 5 == 0).float()
        low, high = confidence_interval(accuracy, outputs, targets)
        assert low < 0.8 < high
        assert 0.8 * width < high - low < 1.2 * width


def test_the_same_model_has_the_same_interval_and_draws_that_give_no_number_do_not_count():
    outputs, targets = torch.randint(2, (2, 50)).float()
    assert confidence_interval(accuracy, outputs, targets) == confidence_interval(accuracy, outputs, targets)

    def sometimes(outputs, targets):
        return float("nan") if targets[0] == 0 else 1.0

    assert confidence_interval(sometimes, outputs, targets) == (1.0, 1.0)


def test_a_metric_that_is_slow_has_no_interval_and_is_not_called_for_long(monkeypatch):
    monkeypatch.setattr(bootstrap, "LIMIT_S", 0.0)
    calls = []
    with pytest.raises(NoIntervalError, match="200 resamples would take over 0 s"):
        confidence_interval(lambda outputs, targets: calls.append(1) or 1.0, torch.zeros(5), torch.zeros(5))
    assert len(calls) == bootstrap.TRIED


def test_a_metric_that_fails_on_a_resample_or_is_never_a_number_has_no_interval_and_a_reason():
    outputs, targets = torch.zeros(30), torch.tensor([1.0, *[0.0] * 29])

    def ranked(outputs, targets):
        if not targets.any():
            raise ValueError("only one class is present")
        return 0.5

    with pytest.raises(NoIntervalError, match=r"it fails on resample \d+: ValueError: only one class is present"):
        confidence_interval(ranked, outputs, targets)
    with pytest.raises(NoIntervalError, match="it is not a number on any resample"):
        confidence_interval(lambda outputs, targets: float("nan"), outputs, targets)


@pytest.mark.parametrize("number", [torch.tensor(0.5), np.float32(0.5), torch.tensor([0.5]), True, 1])
def test_a_figure_may_be_a_number_of_any_kind(number):
    low, high = confidence_interval(lambda outputs, targets: number, torch.zeros(5), torch.zeros(5))
    assert low == high == float(number)
