"""Where two forms of a model part, caused for real: by layers that compute something else when they are exported."""

import pytest
import torch
from torch import nn

from heliostat.compression.export import save_onnx
from heliostat.compression.parity import apart, check_parity, difference, values_of_module
from heliostat.compression.programs import save_program
from heliostat.errors import StageError


class Sly(nn.Module):
    """A layer that is another one in an exported graph."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        exporting = torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()
        return self.linear(x) * (1.5 if exporting else 1.0)


class Net(nn.Module):
    """The sly layer lies deep inside, behind a convolution and a batch norm that an exporter fuses."""

    def __init__(self, middle):
        super().__init__()
        self.stem = nn.Conv1d(2, 3, 1)
        self.norm = nn.BatchNorm1d(3)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Sequential(middle, nn.ReLU())])
        self.head = nn.Linear(18, 2)

    def forward(self, x):
        x = self.norm(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x.flatten(1))


class Between(nn.Module):
    """What differs is done between two layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = self.first(x)
        if torch.compiler.is_exporting():
            x = x + 1
        return self.second(x)


@pytest.fixture
def rows():
    return torch.randn(5, 2, 6)


def test_an_onnx_graph_that_parts_from_the_model_is_refused_with_the_layer_whichever_exporter_made_it(tmp_path, rows):
    net = Net(Sly())
    net(rows)  # batch norm has seen data
    with pytest.raises(StageError) as caught:
        save_onnx(net, tmp_path, example=rows)
    trace, other = str(caught.value).split("torch.export: ")
    for text in (trace, other):
        assert "they part at layer 'blocks.1.0' (Sly): max difference" in text
        assert "tolerance 0.001; all layers up to 'blocks.1.0.linear' agree" in text


def test_a_graph_of_torch_export_that_parts_from_the_model_is_refused_with_the_layer(tmp_path, rows):
    with pytest.raises(StageError, match=r"part at layer 'blocks\.1\.0' \(Sly\).*up to 'blocks\.1\.0\.linear' agree"):
        save_program(Net(Sly()), tmp_path, example=rows, format="pt2")


def test_what_differs_between_two_layers_is_found_at_the_second(tmp_path, rows):
    with pytest.raises(StageError, match=r"part at layer 'second' .*up to 'first' agree"):
        save_program(Between(), tmp_path, example=rows[:, 0], format="pt2")


def test_a_model_that_comes_back_different_is_refused_with_the_layer(rows):
    net, other = Net(nn.Linear(6, 6)).eval(), Net(nn.Linear(6, 6)).eval()
    other.load_state_dict(net.state_dict())
    check_parity(net, other, rows, what="it", values=lambda batch: values_of_module(other, batch))
    with torch.no_grad():
        other.blocks[1][0].bias += 1
    with pytest.raises(
        StageError, match=r"^it does not answer as the model.*'blocks\.1\.0' \(Linear\): max difference 1,"
    ):
        check_parity(net, other, rows, what="it", values=lambda batch: values_of_module(other, batch))


def test_random_numbers_are_no_difference(rows):
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    noisy = Noisy()
    check_parity(noisy, noisy, rows, what="it", values=lambda batch: {})


def test_infinity_in_both_is_no_difference_and_not_a_number_in_one_is():
    masked = torch.tensor([1.0, -torch.inf])
    assert difference(masked, masked) == 0
    assert not apart(masked, masked)
    assert apart(torch.tensor([torch.nan]), torch.tensor([1.0]))
