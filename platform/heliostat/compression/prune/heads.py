"""Whole heads of attention removed: `nn.MultiheadAttention` becomes the same computation over fewer of them.

A head is inside its layer, so nothing else depends on it: the rows that project its queries, keys and values go, and
the columns that its output is mixed by. Which heads matter is what the loss says to first order when they go (Michel et
al. 2019, https://arxiv.org/abs/1905.10650), or the size of their weights.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from heliostat.compression.layers import skipped
from heliostat.compression.parametrizations import copied
from heliostat.compression.prune.masks import Sparsity, check_sparsity
from heliostat.compression.prune.plan import Backward
from heliostat.errors import SpecError, StageError


class Attention(nn.MultiheadAttention):
    """Self-attention and cross-attention over `num_heads` heads of a width that no longer divides `embed_dim` by them.

    The state dict has the names of `nn.MultiheadAttention`'s: `in_proj_weight` (3 * heads * width, embed_dim) and on.
    """

    def __init__(self, *, embed_dim: int, num_heads: int, head_dim: int, bias: bool, dropout: float, batch_first: bool):
        super().__init__(embed_dim, 1, bias=bias, dropout=dropout, batch_first=batch_first)
        inner = num_heads * head_dim
        self.num_heads, self.head_dim = num_heads, head_dim
        self.in_proj_weight = nn.Parameter(torch.empty(3 * inner, embed_dim))
        if bias:
            self.in_proj_bias = nn.Parameter(torch.empty(3 * inner))
        self.out_proj = nn.modules.linear.NonDynamicallyQuantizableLinear(inner, embed_dim, bias=bias)
        self._qkv_same_embed_dim = False  # or the encoder layer takes a fused kernel that knows only its own widths

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """As `nn.MultiheadAttention`'s, without attention weights. Masks are true, or -inf, where hidden."""
        if not self.batch_first:
            query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        weights = self.in_proj_weight.chunk(3)
        biases = self.in_proj_bias.chunk(3) if self.in_proj_bias is not None else (None, None, None)
        queries, keys, values = (
            functional.linear(inputs, weight, bias).view(*inputs.shape[:2], self.num_heads, -1).transpose(1, 2)
            for inputs, weight, bias in zip((query, key, value), weights, biases)
        )
        mask = _additive(attn_mask, queries)
        if mask is not None and mask.ndim == 3:  # (batch * heads of before, ...) cannot be told apart any more
            raise ValueError("attention with fewer heads takes one mask for all heads")
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, queries)
            mask = padding[:, None, None, :] + (0 if mask is None else mask)  # type: ignore[index]
        mixed = functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0
        )
        outputs = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return (outputs if self.batch_first else outputs.transpose(0, 1)), None


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))


def attention_layers(model: nn.Module, skip: Sequence[str] = ()) -> dict[str, nn.MultiheadAttention]:
    """The attention layers that `remove_heads` may take heads from. Raises SpecError as it does, for `skip`."""
    kept = skipped(model, skip)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None and name not in kept
    }


def remove_heads(
    model: nn.Module,
    *,
    sparsity: Sparsity,
    of: Mapping[str, int] | None = None,
    skip: Sequence[str] = (),
    backward: Backward | None = None,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A copy of `model` with the fraction `sparsity` of the heads of every attention layer gone, and the history.

    Args:
        sparsity: in [0, 1), or for each attention layer by its name, to the nearest head.
        of: how many heads each of them had before earlier cuts, which `sparsity` is then of.
        skip: patterns (as of `fnmatch`) of names of layers to leave alone.
        backward: rank heads by what it makes of the gradients of a copy of the model; without it, by their weights.

    Raises:
        SpecError: sparsity outside [0, 1), a pattern that matches no layer, a layer that would be left without heads.
        StageError: there is no `nn.MultiheadAttention` over one embedding width.
    """
    for fraction in sparsity.values() if isinstance(sparsity, Mapping) else [sparsity]:
        check_sparsity(fraction, name="head_sparsity")
    model = copied(model)
    layers = attention_layers(model, skip)
    if not layers:
        raise StageError("there are no heads to remove: no nn.MultiheadAttention that is not skipped")
    if backward is not None:
        backward(model)
    step: dict[str, Any] = {"op": "heads", "layers": {}}
    for name, layer in layers.items():
        remaining = _left(sparsity, name, layer.num_heads if of is None else of[name])
        if remaining < 1:
            raise SpecError(f"head_sparsity {sparsity} leaves {name!r} ({layer.num_heads} heads) without any")
        if remaining < layer.num_heads:
            step["layers"][name] = sorted(_importance(layer).topk(remaining).indices.tolist())
    model.zero_grad(set_to_none=True)
    replay(model, step)
    return model, [step] if step["layers"] else []


def replay(model: nn.Module, step: Mapping[str, Any]) -> None:
    """Leave each attention layer that the step names the heads that it names, in place."""
    for name, heads in step["layers"].items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.MultiheadAttention)
        model.set_submodule(name, _with_heads(layer, heads))


def _left(sparsity: Sparsity, name: str, num_heads: int) -> int:
    if isinstance(sparsity, Mapping):
        return num_heads - round(num_heads * sparsity.get(name, 0.0))
    return int(num_heads * (1 - sparsity))


def _importance(layer: nn.MultiheadAttention) -> Tensor:
    """(heads,): of all weights of a head, |w * gradient| where there are gradients, else w^2."""
    total = torch.zeros(layer.num_heads)
    for parameter, dim in ((layer.in_proj_weight, 0), (layer.out_proj.weight, 1)):
        score = parameter.detach().square() if parameter.grad is None else (parameter.detach() * parameter.grad).abs()
        total += score.sum(1 - dim).view(-1, layer.num_heads, layer.head_dim).sum((0, 2))
    return total


def _with_heads(layer: nn.MultiheadAttention, heads: Sequence[int]) -> Attention:
    dims, rows = layer.head_dim, torch.arange(layer.num_heads * layer.head_dim).view(layer.num_heads, -1)
    columns = rows[list(heads)].flatten()
    projections = torch.cat([columns + part * rows.numel() for part in range(3)])
    smaller = Attention(
        embed_dim=layer.embed_dim,
        num_heads=len(heads),
        head_dim=dims,
        bias=layer.in_proj_bias is not None,
        dropout=layer.dropout,
        batch_first=layer.batch_first,
    )
    with torch.no_grad():
        smaller.in_proj_weight.copy_(layer.in_proj_weight[projections])
        smaller.out_proj.weight.copy_(layer.out_proj.weight[:, columns])
        if layer.in_proj_bias is not None:
            smaller.in_proj_bias.copy_(layer.in_proj_bias[projections])
            smaller.out_proj.bias.copy_(layer.out_proj.bias)
    smaller._forward_hooks.update(layer._forward_hooks)
    smaller._forward_pre_hooks.update(layer._forward_pre_hooks)
    return smaller.train(layer.training)
