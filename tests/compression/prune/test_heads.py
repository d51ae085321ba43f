"""Attention with fewer heads."""

import json

import pytest
import torch
from torch import nn

from heliostat.compression.history import replay
from heliostat.compression.prune.heads import remove_heads
from heliostat.compression.prune.structured import structured
from heliostat.errors import SpecError, StageError


@pytest.fixture
def tokens():
    return torch.randint(50, (4, 7))


def test_without_its_idle_heads_attention_answers_as_before_and_is_smaller(nets, tokens):
    model = nets.Transformer().eval()
    for layer in model.encoder.layers:  # two heads of width 8: the second adds nothing
        layer.self_attn.out_proj.weight.data[:, 8:] = 0
        layer.self_attn.in_proj_weight.data.view(3, 2, 8, 16)[:, 1] *= 1e-3
    smaller, history = remove_heads(model, sparsity=0.5)
    assert history == [{"op": "heads", "layers": {f"encoder.layers.{i}.self_attn": [0] for i in (0, 1)}}]
    assert smaller.encoder.layers[0].self_attn.in_proj_weight.shape == (24, 16)
    assert torch.allclose(smaller(tokens), model(tokens), atol=1e-5)
    with torch.no_grad():  # the encoder has a fused path of its own then
        assert torch.allclose(smaller(tokens), model(tokens), atol=1e-5)
    rebuilt = replay(nets.Transformer(), json.loads(json.dumps(history)))
    rebuilt.load_state_dict(smaller.state_dict())
    assert torch.equal(rebuilt.eval()(tokens), smaller(tokens))


def test_heads_are_ranked_by_the_loss_when_gradients_say_so(nets, tokens):
    model = nets.Transformer().eval()
    attention = model.encoder.layers[0].self_attn
    attention.out_proj.weight.data[:, :8] = 0  # the first head has the larger weights and changes nothing
    attention.in_proj_weight.data.view(3, 2, 8, 16)[:, 0] *= 10

    def backward(copy):
        copy(tokens).square().sum().backward()

    by_size, by_loss = (remove_heads(model, sparsity=0.5, backward=b)[1][0]["layers"] for b in (None, backward))
    assert by_size["encoder.layers.0.self_attn"] == [0]
    assert by_loss["encoder.layers.0.self_attn"] == [1]


def test_each_attention_layer_may_lose_another_part_of_its_heads(nets):
    first, second = (f"encoder.layers.{i}.self_attn" for i in (0, 1))
    smaller, history = remove_heads(nets.Transformer(), sparsity={first: 0.4, second: 0.2})  # to the nearest of two
    assert history == [{"op": "heads", "layers": {first: history[0]["layers"][first]}}]
    assert [smaller.get_submodule(name).in_proj_weight.shape[0] for name in (first, second)] == [24, 48]
    assert remove_heads(nets.Transformer(), sparsity={second: 0.2})[1] == []


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_with_fewer_heads_keeps_to_its_masks(batch_first):
    smaller, _ = remove_heads(nn.Sequential(nn.MultiheadAttention(16, 4, batch_first=batch_first)), sparsity=0.25)
    x, causal = torch.randn(2, 5, 16), torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
    padded = torch.zeros(2, 5, dtype=torch.bool)
    padded[:, 4] = True
    changed = x.clone()
    changed[:, 4] += 1
    both = {"attn_mask": causal, "key_padding_mask": padded}
    for masks in ({"attn_mask": causal}, {"key_padding_mask": padded}, both):
        inputs = [y if batch_first else y.transpose(0, 1) for y in (x, changed)]
        before, after = (smaller[0](inputs[0], y, y, **masks)[0] for y in inputs)
        if not batch_first:
            before, after = before.transpose(0, 1), after.transpose(0, 1)
        assert torch.allclose(before[:, :4], after[:, :4])
        assert before.shape == (2, 5, 16)


def test_channels_can_be_removed_after_heads_and_both_replay(nets, tokens):
    fewer, history = remove_heads(nets.Transformer(), sparsity=0.5)
    smaller, more = structured(fewer, example=tokens, sparsity=0.5)
    assert smaller.encoder.layers[0].linear1.out_features == 16
    assert "relies on its width" in more[0]["kept"]["encoder.layers.0.self_attn"]
    replay(nets.Transformer(), [*history, *more]).load_state_dict(smaller.state_dict())


def test_attention_left_without_heads_and_a_model_without_attention_are_refused(nets):
    with pytest.raises(SpecError, match=r"head_sparsity 0.9 leaves 'encoder.layers.0.self_attn' \(2 heads\) without"):
        remove_heads(nets.Transformer(), sparsity=0.9)
    with pytest.raises(StageError, match="no heads to remove"):
        remove_heads(nets.mlp(), sparsity=0.5)
