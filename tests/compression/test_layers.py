"""What layers tell of a model without any data."""

import pytest
import torch
from torch import nn

from heliostat.compression.layers import num_outputs


class Net(nn.Module):
    """Its head is made before its body, and used after it."""

    def __init__(self, *, summed=False):
        super().__init__()
        self.head, self.body, self.summed = nn.Linear(16, 5), nn.Linear(8, 16), summed

    def forward(self, inputs):
        outputs = self.head(torch.relu(self.body(inputs)))
        return outputs.sum(1) if self.summed else outputs


class Branching(nn.Module):
    def forward(self, inputs):
        return inputs if inputs.sum() > 0 else -inputs


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: nn.Sequential(nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 7)), 7),
        (lambda: nn.Sequential(nn.Linear(8, 7), nn.LogSoftmax(1)), 7),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.Conv2d(4, 2, 1))), 2),
        (Net, 5),
        (lambda: Net(summed=True), None),
        (lambda: nn.Sequential(nn.Linear(8, 6), nn.Unflatten(1, (2, 3))), None),
        (Branching, None),
    ],
)
def test_a_model_that_ends_in_a_layer_tells_how_many_outputs_it_gives(make, expected):
    with torch.device("meta"):
        assert num_outputs(make()) == expected
