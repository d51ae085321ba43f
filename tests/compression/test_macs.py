import pytest
import torch
from torch import nn

from heliostat.compression.macs import num_macs


def test_every_multiplication_of_a_convolutional_network_is_counted_for_one_row(nets, images):
    pixels = 8 * 8
    expected = pixels * (8 * 9 + 8 * 8 * 9 + 8 * 9 + 8 * 16) + 16 * 5
    assert num_macs(nets.ConvNet(), images) == expected


@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
@pytest.mark.parametrize("directions", [1, 2])
def test_recurrent_layers_count_at_every_time_step(kind, gates, directions):
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = getattr(nn, kind)(6, 12, num_layers=2, batch_first=True, bidirectional=directions == 2)

        def forward(self, x):
            return self.layer(x)[0]

    weights = directions * gates * 12 * ((6 + 12) + (12 * directions + 12))
    assert num_macs(Last(), torch.randn(3, 7, 6)) == 7 * weights


def test_attention_counts_its_projections_and_its_products(nets):
    tokens, width = 7, 16
    layer = tokens * (4 * width * width + 2 * width * 32) + 2 * tokens * tokens * width
    trained, frozen = nets.Transformer(), nets.Transformer().requires_grad_(False)
    for model in (trained, frozen):
        assert num_macs(model, torch.randint(50, (2, tokens))) == 2 * layer + width * 5
    assert torch.backends.mha.get_fastpath_enabled()
