"""Sub-networks that share the weights of a larger one."""

import pytest
import torch
from torch import nn

from heliostat.compression.subnets import (
    forward,
    recalibrate,
    shapes_of,
    take_weights,
    why_confused,
    why_no_subnet,
)


def _net(width=4, depth=2):
    return nn.ModuleDict(
        {
            "stem": nn.Linear(3, width),
            "blocks": nn.Sequential(*(nn.Linear(width, width) for _ in range(depth))),
            "head": nn.Linear(width, 2),
        }
    )


class Net(nn.Module):
    def __init__(self, **arguments):
        super().__init__()
        self.parts = _net(**arguments)

    def forward(self, x):
        return self.parts["head"](self.parts["blocks"](self.parts["stem"](x)))


def test_a_subnet_computes_with_the_leading_slices_and_teaches_them_alone():
    large, small, inputs = Net(), Net(width=2, depth=1), torch.randn(5, 3)
    outputs = forward(small, dict(large.named_parameters()), inputs)
    outputs.sum().backward()
    gradient = large.parts["blocks"][0].weight.grad
    assert gradient[:2, :2].abs().sum() > 0
    assert gradient[2:].abs().sum() == gradient[:, 2:].abs().sum() == 0
    assert large.parts["blocks"][1].weight.grad is None
    take_weights(small, dict(large.named_parameters()))
    torch.testing.assert_close(small(inputs), outputs)


def test_a_parameter_that_is_no_slice_is_named():
    large = shapes_of(Net())
    assert why_no_subnet(shapes_of(Net(width=2)), large) is None
    assert "'parts.stem.weight' (8, 3) is no slice of the largest network's (4, 3)" in why_no_subnet(
        shapes_of(Net(width=8)), large
    )
    assert "'parts.blocks.2.weight' (4, 4) is not there" in why_no_subnet(shapes_of(Net(depth=3)), large)


def test_a_depth_that_moves_the_last_layer_to_another_name_is_told():
    def chain(depth):
        return shapes_of(nn.Sequential(*(nn.Linear(4, 4) for _ in range(depth)), nn.Linear(4, 2)))

    assert why_no_subnet(chain(1), chain(2)) is None
    assert "leaves out '2.weight' and makes '1.weight' (2, 4) of (4, 4)" in why_confused(chain(1), chain(2))
    assert why_confused(shapes_of(Net(depth=1)), shapes_of(Net())) is None


def test_statistics_of_batch_norm_become_those_of_the_data():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    inputs = torch.randn(4, 200, 3) * 3 + 5
    recalibrate(model, inputs)
    assert model[0].running_mean == pytest.approx(inputs.mean((0, 1)), abs=1e-4)
    assert model[0].running_var.sqrt() == pytest.approx(inputs.flatten(0, 1).std(0), rel=0.05)
    assert (model[0].momentum, model.training, model[0].training) == (0.1, False, False)
