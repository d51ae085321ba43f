"""Ways to choose single weights: by layer, two of four, more and more while training; and what is left alone."""

import copy

import pytest
import torch
from torch import nn

from heliostat.compression.prune.masks import Ramp, magnitude, two_of_four
from heliostat.errors import StageError


def _shake(model, step):
    """What an optimizer step does to the weights, the same at every call."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))


def test_by_layer_each_layer_loses_the_same_fraction(nets):
    model = nets.ConvNet()
    model.block.weight.data *= 100
    together, apart = (magnitude(copy.deepcopy(model), sparsity=0.3, scope=scope) for scope in ("global", "layer"))
    assert together.sparsities["block"] < 0.05
    assert apart.sparsities == pytest.approx(dict.fromkeys(apart.sparsities, 0.3), abs=0.01)


def test_two_of_every_four_weights_along_the_input_channels_are_zero(nets):
    model = nets.ConvNet()
    masks = two_of_four(model)
    rows = model.block.weight.movedim(1, -1).reshape(-1, 4)
    assert (rows == 0).sum(1).tolist() == [2] * len(rows)
    assert set(masks.sparsities) == {"block", "pointwise", "head"}
    assert masks.kept["stem"] == "its 1 input channels do not divide by 4"
    with pytest.raises(StageError, match="no layer fits"):
        two_of_four(nn.Sequential(nn.Linear(3, 3)))


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_recurrent_layers_are_left_alone_with_a_reason(nets, kind):
    model = nets.Recurrent(kind)
    masks = magnitude(model, sparsity=0.5)
    assert masks.kept["layer"].startswith(f"{kind}: recurrent")
    assert (model.layer.weight_hh_l0 != 0).all()


def test_attention_is_pruned_and_an_embedding_is_not(nets):
    model = nets.Transformer()
    masks = magnitude(model, sparsity=0.5, skip=["head"])
    assert set(masks.kept) == {"embedding", "head"}
    assert (model.encoder.layers[0].self_attn.in_proj_weight == 0).any()
    assert (model.embedding.weight != 0).all()


def test_a_ramp_rises_by_the_cubic_law_and_ends_at_the_sparsity_exactly(nets):
    model, seen = nets.ConvNet(), []
    ramp = Ramp(0.8, 10)
    for step in range(10):
        _shake(model, step)
        ramp(model)
        seen.append(ramp.masks.sparsity)
        assert all((model.get_parameter(name)[pruned] == 0).all() for name, pruned in ramp.masks.pruned.items())
    assert seen == pytest.approx([0.8 * (1 - (1 - t / 10) ** 3) for t in range(1, 11)], abs=1e-3)


def test_a_ramp_that_goes_on_after_a_crash_prunes_what_the_uninterrupted_one_would(nets):
    def train(model, ramp, steps):
        for step in steps:
            _shake(model, step)
            ramp(model)
        return copy.deepcopy(model.state_dict())

    one = nets.ConvNet()
    two = copy.deepcopy(one)
    expected = train(one, Ramp(0.8, 200), range(150))
    crashed = train(two, Ramp(0.8, 200), range(90))
    again = Ramp(0.8, 200)
    again.resume(two, crashed, step=90)
    found = train(two, again, range(90, 150))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
