import pytest
import torch
from pydantic import ValidationError
from torch import nn

from heliostat.training.config import OPTIMIZERS, OptimizerConfig, SchedulerConfig
from heliostat.training.optim import build_optimizer, build_schedule


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_that_the_config_knows_can_be_built_and_steps(name: str) -> None:
    model = nn.Linear(2, 1)
    options = {"momentum": 0.9} if "momentum" in OPTIMIZERS[name] else {}
    optimizer = build_optimizer(model.parameters(), OptimizerConfig(name=name, lr=0.5, **options))
    before = model.weight.detach().clone()
    model(torch.ones(1, 2)).backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)
    assert all(optimizer.param_groups[0][option] == value for option, value in {"lr": 0.5, **options}.items())


def test_an_option_of_another_optimizer_is_refused() -> None:
    with pytest.raises(ValidationError, match="sgd takes no 'betas'"):
        OptimizerConfig(name="sgd", betas=(0.9, 0.99))


def test_cosine_starts_at_the_full_rate_after_warm_up_and_ends_near_zero() -> None:
    optimizer = build_optimizer(nn.Linear(2, 1).parameters(), OptimizerConfig(name="sgd", lr=1.0))
    scheduler = build_schedule(
        optimizer, SchedulerConfig(name="cosine", warmup_epochs=0.5), epochs=2, steps_per_epoch=10
    )
    rates = []
    for _ in range(20):
        rates.append(scheduler.lr)
        optimizer.step()
        scheduler.step_over()
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert 0 < rates[-1] < 0.02
    assert scheduler.lr == pytest.approx(0.0)
