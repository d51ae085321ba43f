"""Which layers `tp` splits, and which plans it refuses because they would compute something else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from heliostat.errors import SpecError
from heliostat.training.config import TpConfig
from heliostat.training.strategies.tp import auto_plan, left_whole, named_layers, tp_plan
from heliostat.training.strategies.tp_attention import why_not_split

WIDTH = 8


class Attention(nn.Module):
    """Four linear layers; how the heads are taken apart is the test's."""

    def __init__(self, heads: Callable[["Attention", Tensor], Tensor], **counts: int) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.add_module(name, nn.Linear(WIDTH, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)
        vars(self).update(counts)
        self.heads = heads

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = (self.heads(self, self.get_submodule(name)(tokens)) for name in ("q_proj", "k_proj", "v_proj"))
        found = nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        outputs: Tensor = self.get_submodule("out_proj")(found.transpose(1, 2).flatten(2))
        return outputs


@pytest.mark.parametrize(
    ("heads", "counts"),
    [
        (lambda self, x: x.view(*x.shape[:2], self.num_heads, -1), {"num_heads": 4}),
        (lambda self, x: x.view(*x.shape[:2], self.n_head, 2), {"n_head": 4}),
        (lambda self, x: x.view(*x.shape[:2], -1, 2), {}),
    ],
    ids=["by their number", "by number and size", "by their size"],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_attention_is_split_whichever_way_it_takes_its_heads_apart(heads: Any, counts: Any, device: str) -> None:
    model = nn.Sequential(Attention(heads, **counts)).to(device)
    assert auto_plan(model, 2) == {
        **{f"0.{name}": "colwise" for name in ("q_proj", "k_proj", "v_proj")},
        "0.out_proj": "rowwise",
    }
    assert left_whole(model, auto_plan(model, 2)) == ["0.norm"]


@pytest.mark.parametrize(
    ("heads", "counts", "why"),
    [
        (lambda self, x: x.view(*x.shape[:2], 4, -1), {}, "its heads, computed apart and summed, give something else"),
        (lambda self, x: x.view(*x.shape[:2], 4, 2), {}, "its forward does not take a part of its heads"),
        (lambda self, x: self.norm(x).view(*x.shape[:2], -1, 2), {}, "its forward does not take a part of its heads"),
        (
            lambda self, x: x.view(*x.shape[:2], self.num_heads, -1),
            {"num_heads": 1},
            "2 workers cannot split its 1 heads",
        ),
    ],
    ids=["a number that is written down", "and a size", "a norm over all heads", "one head"],
)
def test_an_attention_that_would_compute_something_else_stays_whole(heads: Any, counts: Any, why: str) -> None:
    attention = Attention(heads, **counts)
    assert str(why_not_split(attention, 2)).startswith(why)
    model = nn.ModuleDict({"attention": attention, "fc1": nn.Linear(4, 4), "fc2": nn.Linear(4, 4)})
    assert auto_plan(model, 2) == {"fc1": "colwise", "fc2": "rowwise"}
    with pytest.raises(SpecError, match="the attention 'attention' cannot be split: "):
        tp_plan(model, TpConfig(plan={"attention.?_proj": "colwise", "attention.out_proj": "rowwise"}), 2)


def test_trying_an_attention_out_leaves_it_and_the_generator_alone() -> None:
    attention = Attention(lambda self, x: x.view(*x.shape[:2], self.num_heads, -1), num_heads=4)
    before, state = {k: v.clone() for k, v in attention.state_dict().items()}, torch.get_rng_state()
    assert why_not_split(attention, 2) is None
    assert vars(attention)["num_heads"] == 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in attention.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        (
            {"0": "colwise"},
            "'0' is colwise, so each worker has a part of its 12 outputs, and no rowwise layer after it",
        ),
        ({"4": "rowwise"}, "'4' is rowwise, so each worker takes a part of 12 inputs, and no colwise layer before it"),
        ({"0": "colwise", "4": "rowwise"}, "'0' is colwise and gives its outputs in parts to '2'"),
        ({"2": "colwise", "4": "rowwise"}, None),
        ({"4": "colwise", "5": "rowwise"}, "2 workers cannot split the 3 outputs of '4'"),
    ],
    ids=str,
)
def test_a_plan_that_hands_on_parts_where_whole_outputs_are_taken_is_refused(plan: Any, told: str | None) -> None:
    layers = (nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3), nn.Linear(3, 2))
    model = nn.Sequential(*layers)
    if told is None:
        assert tp_plan(model, TpConfig(plan=plan), 2) == plan
        return
    with pytest.raises(SpecError, match=told):
        tp_plan(model, TpConfig(plan=plan), 2)


def test_auto_finds_torchs_transformer_layers_and_an_mlp() -> None:
    model = nn.Sequential(
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
        nn.Linear(8, 6),
        nn.ReLU(),
        nn.Linear(6, 3),
    )
    assert auto_plan(model, 2) == {
        **{f"0.layers.{n}.self_attn": "heads" for n in (0, 1)},
        **{f"0.layers.{n}.linear{k}": style for n in (0, 1) for k, style in ((1, "colwise"), (2, "rowwise"))},
        "1": "colwise",
        "3": "rowwise",
    }
    with pytest.raises(SpecError, match="found no layers that 7 workers can split"):
        auto_plan(model, 7)


def test_a_pattern_that_matches_nothing_names_the_nearest_module() -> None:
    with pytest.raises(SpecError, match="no module 'fc11'; did you mean 'fc1'"):
        named_layers(nn.ModuleDict({"fc1": nn.Linear(1, 1), "other": nn.Linear(1, 1)}), {"fc11": "colwise"})
