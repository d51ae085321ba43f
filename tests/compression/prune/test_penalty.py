"""Sparsity that a penalty teaches, and the cut at a threshold after it."""

import copy

import pytest
import torch
from torch import nn

from heliostat.compression.history import replay
from heliostat.compression.prune.masks import below
from heliostat.compression.prune.penalty import group_lasso, l1
from heliostat.compression.prune.structured import structured
from heliostat.errors import SpecError, StageError


def _train(model, inputs, targets, penalty, *, strength, steps):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        (nn.functional.cross_entropy(model(inputs), targets) + strength * penalty()).backward()
        optimizer.step()


def test_an_l1_penalty_drives_what_is_not_needed_below_the_threshold(nets):
    inputs = torch.randn(64, 6)
    targets = (inputs[:, 0] > 0).long()  # one input of six matters
    model = nets.mlp()
    before = below(copy.deepcopy(model), threshold=0.02).sparsity
    _train(model, inputs, targets, l1(model), strength=0.01, steps=150)
    masks = below(model, threshold=0.02)
    assert masks.sparsity > max(0.5, 2 * before)
    assert model[0].weight[:, 0].abs().max() > 0.1
    assert (model(inputs).argmax(1) == targets).float().mean() > 0.9


def test_a_threshold_that_no_weight_is_below_is_an_error_that_says_what_would_help(nets):
    with pytest.raises(StageError, match=r"no weight is below the threshold 1e-09 .* a stronger or longer penalty"):
        below(nets.mlp(), threshold=1e-9)
    with pytest.raises(SpecError, match="threshold 100 leaves the layer '0' without any weight"):
        below(nets.mlp(), threshold=100)


def test_a_group_lasso_fades_whole_channels_which_the_threshold_removes(nets):
    inputs = torch.randn(64, 6)
    targets = (inputs[:, 0] > 0).long()
    model = nets.mlp()
    _train(model, inputs, targets, group_lasso(model, example=inputs), strength=0.02, steps=200)
    smaller, history = structured(model, example=inputs, threshold=0.02)
    assert smaller[0].out_features < 12
    replay(nets.mlp(), history).load_state_dict(smaller.state_dict())
    assert (smaller(inputs).argmax(1) == targets).float().mean() > 0.9


def test_the_group_lasso_of_a_channel_counts_every_layer_that_the_channel_is_in():
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 4))
    rows = torch.cat([model[0].weight, model[2].weight.T], dim=1)
    expected = (rows.norm(dim=1) * rows.shape[1] ** 0.5).sum()
    assert group_lasso(model, example=torch.randn(1, 3))().item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_weights_behind_a_flattened_channel_are_in_its_group():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 4, 3))
    rows = torch.cat([model[0].weight.flatten(1), model[2].weight.view(3, 2, 4).transpose(0, 1).flatten(1)], dim=1)
    expected = (rows.norm(dim=1) * rows.shape[1] ** 0.5).sum()
    assert group_lasso(model, example=torch.randn(1, 1, 4, 4))().item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_pattern_that_matches_no_layer_is_refused(nets):
    with pytest.raises(SpecError, match="'3' matches no layer"):
        l1(nets.mlp(), skip=["3"])
    with pytest.raises(SpecError, match="'3' matches no layer"):
        group_lasso(nets.mlp(), example=torch.randn(1, 6), skip=["3"])
