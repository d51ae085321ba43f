"""The marks by which a validated model and the saved one are compared layer by layer."""

import pytest
import torch
from torch import nn

from heliostat.training.config import TrainConfig
from heliostat.training.loop import fit
from heliostat.training.marks import marking


@pytest.mark.parametrize("whole", [True, False], ids=["the whole model", "a part of it"])
def test_a_model_that_torchscript_compiled_trains(whole, data, objective):
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    width = data["train"][0][0].shape[0]
    plain[0] = nn.Linear(width, 8)
    plain[2] = nn.Linear(8, 1 + max(int(target) for _, target in data["train"]))
    model = torch.jit.script(plain) if whole else nn.Sequential(torch.jit.script(plain), nn.Identity())
    fitted = fit(model, data, TrainConfig(epochs=1, batch_size=32), objective=objective, seed=0)
    assert fitted.metrics["val_loss"] > 0


def test_the_layers_around_a_torchscript_module_are_marked():
    model = nn.Sequential(torch.jit.script(nn.Linear(4, 8)), nn.Linear(8, 2))
    with marking(model) as marks:
        model(torch.ones(3, 4))
    assert set(marks) == {"1", ""}
