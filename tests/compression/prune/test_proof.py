"""Cuts of networks of many kinds are the masked network, or are not made."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional

from heliostat.compression.history import replay
from heliostat.compression.prune.masks import magnitude
from heliostat.compression.prune.penalty import group_lasso
from heliostat.compression.prune.structured import structured, widths
from heliostat.errors import StageError


def _num_params(model):
    return sum(parameter.numel() for parameter in model.parameters())


class Attention(nn.Module):
    """A transformer's block with its projections written by hand, apart or as one."""

    def __init__(self, packed):
        super().__init__()
        self.first_norm, self.second_norm = nn.LayerNorm(64), nn.LayerNorm(64)
        self.projections = nn.ModuleList([nn.Linear(64, 192)] if packed else [nn.Linear(64, 64) for _ in range(3)])
        self.mix, self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        n, length, _ = x.shape
        projected = torch.cat([layer(self.first_norm(x)) for layer in self.projections], -1)
        q, k, v = projected.view(n, length, 3, 4, 16).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, 64)
        x = x + self.mix(mixed)
        return x + self.down(functional.gelu(self.up(self.second_norm(x))))


class Classifier(nn.Module):
    def __init__(self, packed):
        super().__init__()
        self.embedding, self.block, self.head = nn.Embedding(30, 64), Attention(packed), nn.Linear(64, 3)

    def forward(self, x):
        return self.head(self.block(self.embedding(x)).mean(1))


@pytest.mark.parametrize("packed", [False, True])
def test_attention_by_hand_loses_channels_of_its_mlp_and_keeps_its_heads_with_the_reason(packed):
    model, tokens = Classifier(packed), torch.randint(30, (4, 7))
    smaller, (step,) = structured(model, example=tokens, sparsity=0.25)
    assert smaller.block.up.out_features == 96
    assert smaller.block.mix.out_features == 64
    assert "LayerNorm" in step["kept"]["embedding"]
    assert step["kept"].keys() >= {f"block.projections.{i}" for i in range(len(model.block.projections))}
    assert widths(model, example=tokens) == {"block.up": 128}


class Tied(nn.Module):
    """A language model of which the embedding's weight is the decoder's; alone, or through a residual stream."""

    def __init__(self, residual):
        super().__init__()
        self.embedding, self.middle, self.decoder = (
            nn.Embedding(50, 32),
            nn.Linear(32, 32),
            nn.Linear(32, 50, bias=False),
        )
        self.decoder.weight = self.embedding.weight
        self.residual = residual

    def forward(self, x):
        x = self.embedding(x)
        return self.decoder(torch.tanh(self.middle(x)) + (x if self.residual else 0))


@pytest.mark.parametrize("residual", [False, True])
def test_layers_that_share_a_weight_are_cut_alike_and_still_share_it(residual):
    model, tokens = Tied(residual), torch.randint(50, (4, 7))
    smaller, history = structured(model, example=tokens, sparsity=0.25)
    assert smaller.decoder.weight is smaller.embedding.weight
    assert _num_params(smaller) == 50 * 24 + 24 * 24 + 24 < _num_params(model)
    rebuilt = replay(Tied(residual), json.loads(json.dumps(history)))
    assert rebuilt.decoder.weight is rebuilt.embedding.weight
    rebuilt.load_state_dict(smaller.state_dict())
    assert torch.equal(rebuilt.eval()(tokens), smaller.eval()(tokens))


class HalfTied(nn.Module):
    """Of its tied weight, the embedding's side feeds a layer of fixed width."""

    def __init__(self):
        super().__init__()
        self.embedding, self.recurrent = nn.Embedding(50, 32), nn.GRU(32, 32, batch_first=True)
        self.middle, self.decoder = nn.Linear(32, 32), nn.Linear(32, 50, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, x):
        return self.decoder(self.middle(self.recurrent(self.embedding(x))[0]))


def test_a_layer_whose_cut_would_untie_a_weight_is_left_alone():
    with pytest.raises(StageError, match=r"middle: 'decoder.weight' is tied to 'embedding.weight'"):
        structured(HalfTied(), example=torch.randint(50, (4, 7)), sparsity=0.25)


def test_the_weights_of_an_embedding_are_not_masked_through_a_layer_that_shares_them():
    model = Tied(residual=False)
    masks = magnitude(model, sparsity=0.5)
    assert masks.pruned.keys() == {"middle.weight"}
    assert "embedding.weight" in masks.kept["decoder"]


class Normed(nn.Module):
    """Has no channels but those that a norm takes its statistics over."""

    def __init__(self, norm):
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(6, 16), norm, nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.norm(self.first(x)).relu())


@pytest.mark.parametrize("norm", [nn.LayerNorm(16), nn.GroupNorm(1, 16)], ids=["layer", "group"])
def test_channels_under_a_norm_over_all_of_them_go_only_where_no_others_can_and_the_step_says_so(norm):
    inputs = torch.randn(8, 6)
    smaller, (step,) = structured(Normed(norm), example=inputs, sparsity=0.25)
    assert smaller.first.out_features == 12
    assert "statistics" in step["approximate"]["norm"]
    beside = nn.Sequential(Normed(norm), nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    smaller, (step,) = structured(beside, example=inputs, sparsity=0.25)
    assert (smaller[0].first.out_features, smaller[1].out_features) == (16, 6)
    assert "approximate" not in step
    assert "normalises over its channels" in step["kept"]["0.first"]


class Gated(nn.Module):
    """A gated linear unit: the halves of one layer meet."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 32, 3), nn.Conv2d(16, 4, 3)

    def forward(self, x):
        value, gate = self.first(x).chunk(2, dim=1)
        return self.head(value * gate.sigmoid()).mean((2, 3))


class WrittenOut(nn.Module):
    """Mixes the channels of its second layer in its forward, beside one that can be cut."""

    def __init__(self, mix):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.mix = mix
        self.register_buffer("scale", torch.rand(16))

    def forward(self, x):
        return self.head(self.mix(self.second(self.first(x).relu()), self))


MIXES = {
    "softmax": lambda x, model: x.softmax(-1),
    "normalised": lambda x, model: functional.normalize(x, dim=-1),
    "mean": lambda x, model: x - x.mean(-1, keepdim=True),
    "rolled": lambda x, model: x.roll(1, -1),
    "sorted": lambda x, model: x.sort(-1).values,
    "buffer": lambda x, model: x * model.scale,
    "cumulative": lambda x, model: x.cumsum(-1),
}


@pytest.mark.parametrize("mix", MIXES)
def test_a_layer_whose_channels_the_forward_mixes_is_left_alone_and_the_rest_is_cut(mix):
    inputs = torch.randn(16, 6)
    smaller, (step,) = structured(WrittenOut(MIXES[mix]), example=inputs, sparsity=0.25)
    exact = mix in {"normalised", "cumulative"}  # zeros add nothing to a sum
    assert smaller.first.out_features == 12
    assert smaller.second.out_features == (12 if exact else 16)
    assert ("second" in step["kept"]) is not exact


def test_the_halves_of_a_gated_unit_go_in_pairs():
    inputs = torch.randn(4, 3, 8, 8)
    smaller, _ = structured(Gated(), example=inputs, sparsity=0.25)
    assert (smaller.first.out_channels, smaller.head.in_channels) == (24, 12)


def test_a_group_lasso_weighs_only_what_a_cut_can_remove():
    inputs = torch.randn(16, 6)
    model = WrittenOut(MIXES["softmax"])
    group_lasso(model, example=inputs)().backward()
    assert model.first.weight.grad is not None
    assert model.head.weight.grad is None


def test_hooks_of_the_user_are_there_after_a_cut():
    calls = []
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    model[0].register_forward_hook(lambda module, given, output: calls.append(output.shape[-1]))
    smaller, _ = structured(model, example=torch.randn(4, 6), sparsity=0.25)
    calls.clear()
    smaller(torch.randn(4, 6))
    assert calls == [12]


def test_a_cut_leaves_the_generators_and_the_statistics_as_they_were(nets, images):
    model = nets.ConvNet()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    structured(model, example=images, sparsity=0.25)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


class ShuffleUnit(nn.Module):
    """Splits the channels, works on one half, and shuffles both, as in ShuffleNet V2 (arXiv 1807.11164)."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        left, right = x.chunk(2, dim=1)
        x = torch.cat((left, self.last(self.first(right).relu())), 1)
        n, channels, height, width = x.shape
        return x.view(n, 2, channels // 2, height, width).transpose(1, 2).reshape(n, channels, height, width)


def test_what_lies_between_the_shuffles_of_a_network_is_cut_and_what_they_couple_is_not():
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), ShuffleUnit(), ShuffleUnit(), nn.Conv2d(16, 32, 1), nn.Conv2d(32, 4, 1)]
    smaller, (step,) = structured(nn.Sequential(*layers), example=torch.randn(4, 3, 8, 8), sparsity=0.25)
    assert [unit.first.out_channels for unit in (smaller[2], smaller[3])] == [6, 6]
    assert (smaller[0].out_channels, smaller[4].out_channels) == (16, 24)
    assert step["kept"].keys() == {"0", "2.last", "3.last", "5"}
