import json

import pytest
import torch
from torch import nn

from heliostat.compression.history import replay
from heliostat.compression.prune.masks import magnitude
from heliostat.compression.prune.structured import structured
from heliostat.errors import SpecError, StageError


def _num_zeros(model):
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return sum(int((m.weight == 0).sum()) for m in layers), sum(m.weight.numel() for m in layers)


def test_magnitude_zeroes_the_smallest_weights_of_all_layers_together(nets):
    model = nets.ConvNet()
    original = torch.cat([p.detach().abs().flatten() for n, p in model.named_parameters() if p.ndim > 1])
    masks = magnitude(model, sparsity=0.6)
    zeros, total = _num_zeros(model)
    assert masks.sparsity == pytest.approx(0.6, abs=1 / total)
    assert zeros == round(0.6 * total)
    left = torch.cat([p.detach().abs().flatten() for n, p in model.named_parameters() if p.ndim > 1])
    assert left[left > 0].min() >= original.kthvalue(zeros).values


def test_zeros_stay_exactly_zero_through_fine_tuning(nets, images):
    model = nets.ConvNet()
    masks = magnitude(model, sparsity=0.5)
    zeros, _ = _num_zeros(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), torch.randint(5, (32,))).backward()
        optimizer.step()
        masks.apply(model)
    assert _num_zeros(model)[0] == zeros
    assert all((model.get_parameter(n)[m] == 0).all() for n, m in masks.pruned.items())


def test_skipped_layers_keep_their_weights(nets, images):
    model = nets.ConvNet()
    magnitude(model, sparsity=0.9, skip=["head", "block*"])
    assert (model.head.weight != 0).all()
    assert (model.block.weight != 0).all()
    smaller, _ = structured(nets.ConvNet(), example=images, sparsity=0.5, skip=["pointwise"])
    assert smaller.pointwise.out_channels == 16


@pytest.mark.parametrize("prune", [magnitude, structured])
@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_a_sparsity_outside_0_to_1_is_refused(nets, images, prune, sparsity):
    arguments = {"example": images} if prune is structured else {}
    with pytest.raises(SpecError, match=r"not in \[0, 1\)"):
        prune(nets.ConvNet(), sparsity=sparsity, **arguments)


@pytest.mark.parametrize("prune", [magnitude, structured])
def test_a_pattern_that_matches_no_layer_is_refused_with_the_nearest(nets, images, prune):
    arguments = {"example": images} if prune is structured else {}
    with pytest.raises(SpecError, match="'haed' matches no layer; did you mean 'head'"):
        prune(nets.ConvNet(), sparsity=0.5, skip=["haed"], **arguments)


def test_a_layer_left_empty_is_refused_by_name(nets, images):
    with pytest.raises(SpecError, match=r"'\w+' \(8 channels\) empty"):
        structured(nets.ConvNet(), example=images, sparsity=0.9)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.data.mul_(1e-3)
    with pytest.raises(SpecError, match="layer '0' without any weight"):
        magnitude(model, sparsity=0.6)


def test_structured_removes_the_fraction_of_every_layers_channels_and_keeps_the_outputs(nets, images):
    model = nets.ConvNet()
    smaller, _ = structured(model, example=images, sparsity=0.25)
    widths = [smaller.stem, smaller.block, smaller.depthwise, smaller.pointwise]
    assert [layer.out_channels for layer in widths] == [6, 6, 6, 12]
    assert smaller.depthwise.groups == 6
    assert smaller.norm.num_features == 6
    assert smaller(images).shape == (32, 5)
    assert model.stem.out_channels == 8


def test_structured_removes_the_weakest_channels(images):
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].weight.data[[1, 3]] *= 1e-3
    strong = model[0].weight.data[[0, 2]]
    smaller, _ = structured(model, example=torch.randn(1, 6), sparsity=0.5)
    assert torch.equal(smaller[0].weight, strong)


def test_round_to_keeps_a_multiple_of_channels(nets, images):
    smaller, _ = structured(nets.ConvNet(), example=images, sparsity=0.3, round_to=4)
    assert (smaller.stem.out_channels, smaller.pointwise.out_channels) == (4, 8)


@pytest.mark.parametrize("kind", ["GRU", "LSTM", "RNN"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent_layers_keep_their_width_and_the_history_says_so(nets, sequences, kind, bidirectional):
    model = nets.Recurrent(kind, bidirectional)
    smaller, (step,) = structured(model, example=sequences, sparsity=0.5)
    assert (smaller.first.out_features, smaller.layer.hidden_size, smaller.middle.out_features) == (16, 12, 8)
    assert kind in step["kept"]["first"]
    assert "output" in step["kept"]["head"]
    replay(nets.Recurrent(kind, bidirectional), [step]).load_state_dict(smaller.state_dict())


def test_attention_keeps_its_width_while_the_layers_between_shrink(nets):
    smaller, history = structured(nets.Transformer(), example=torch.randint(50, (2, 7)), sparsity=0.5)
    assert [layer.linear1.out_features for layer in smaller.encoder.layers] == [16, 16]
    replay(nets.Transformer(), history).load_state_dict(smaller.state_dict())


def test_a_history_is_plain_json_and_rebuilds_the_shapes(nets, images):
    smaller, history = structured(nets.ConvNet(), example=images, sparsity=0.5)
    rebuilt = replay(nets.ConvNet(), json.loads(json.dumps(history)))
    rebuilt.load_state_dict(smaller.state_dict())
    assert torch.equal(rebuilt.eval()(images), smaller.eval()(images))


def test_frozen_parameters_and_the_mode_stay_as_they_were(nets, images):
    model = nets.ConvNet().train()
    model.stem.weight.requires_grad_(False)
    smaller, _ = structured(model, example=images, sparsity=0.5)
    assert smaller.training
    assert [n for n, p in smaller.named_parameters() if not p.requires_grad] == ["stem.weight"]


def test_a_forward_that_relies_on_a_width_is_explained(nets, images):
    with pytest.raises(StageError, match="does not run with fewer channels"):
        structured(nets.FixedReshape(), example=images, sparsity=0.5)


def test_a_model_with_nothing_to_prune_is_refused_with_reasons(images):
    with pytest.raises(StageError, match="it gives the model's output"):
        structured(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), example=images, sparsity=0.5)
    with pytest.raises(StageError, match="nothing to prune"):
        magnitude(nn.Sequential(nn.Flatten()), sparsity=0.5)
