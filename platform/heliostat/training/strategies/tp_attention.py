"""Attention split by its heads: each worker computes some of them, and their outputs are summed.

An attention of four linear layers has its queries, keys and values split by outputs and its last layer by inputs, and
whatever counts its heads counts a worker's own. That this is the same attention is tried out on a copy with random
weights, since only its `forward` knows how it takes the heads apart. `nn.MultiheadAttention` keeps its three
projections in one matrix and has a forward pass of its own here.
"""

import copy
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn import functional

from heliostat.errors import SpecError

PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("query", "key", "value", "out"),
    ("wq", "wk", "wv", "wo"),
    ("to_q", "to_k", "to_v", "to_out"),
    ("q", "k", "v", "o"),
    ("q", "k", "v", "proj"),
)
"""What the four linear layers of an attention are called in common model code."""
HEAD_COUNTS = ("num_heads", "n_heads", "n_head", "nhead", "heads", "num_attention_heads", "num_kv_heads", "n_kv_heads")
"""What the number of heads is called there."""
TOKENS = 4


def projections(module: nn.Module) -> tuple[str, ...]:
    """The names of the four linear layers of an attention; none for any other module."""
    for names in PROJECTIONS:
        if all(isinstance(getattr(module, name, None), nn.Linear) for name in names):
            return names
    return ()


def head_counts(module: nn.Module) -> tuple[str, ...]:
    """The attributes that count the heads of an attention."""
    return tuple(name for name in HEAD_COUNTS if isinstance(getattr(module, name, None), int))


def why_not_split(module: nn.Module, size: int) -> str | None:
    """Why an attention does not compute the same when its heads are divided among so many workers; None if it does."""
    if isinstance(module, nn.MultiheadAttention):
        return _why_not_torchs(module, size)
    names = projections(module)
    for name in names[:3]:
        if _linear(module, name).out_features % size:
            return f"{size} workers cannot split the {_linear(module, name).out_features} outputs of {name}"
    for name in head_counts(module):
        if getattr(module, name) % size:
            return f"{size} workers cannot split its {getattr(module, name)} heads"
    whole = _with_random_weights(module)
    shape = (2, TOKENS, _linear(whole, names[0]).in_features)
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    try:
        expected = _call(whole, inputs)
        parts = [_call(_part(whole, names, rank, size), inputs) for rank in range(size)]
        same = torch.allclose(sum(parts[1:], parts[0]), expected, rtol=1e-3, atol=1e-4)
    except Exception as error:  # whatever a forward pass says that is given other layers, or inputs, than it takes
        return f"its forward does not take a part of its heads ({type(error).__name__}: {error})"
    return None if same else "its heads, computed apart and summed, give something else"


def divide_heads(module: nn.Module, size: int) -> None:
    """Let an attention count a worker's own heads."""
    for name in head_counts(module):
        setattr(module, name, getattr(module, name) // size)


def _with_random_weights(module: nn.Module) -> nn.Module:
    """A copy on CPU, of whatever device the module is."""
    with torch.random.fork_rng(devices=[]):
        made = copy.deepcopy(module).to_empty(device="cpu").float().eval()
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            for name, buffer in module.named_buffers():
                buffer_of_copy = made.get_buffer(name)
                buffer_of_copy.zero_() if buffer.is_meta else buffer_of_copy.copy_(buffer)
    return made


def _part(whole: nn.Module, names: tuple[str, ...], rank: int, size: int) -> nn.Module:
    """One worker's part. The bias of the last layer is added once, by the first."""
    part = copy.deepcopy(whole)
    *heads, last = names
    for name in heads:
        layer = _linear(part, name)
        layer.weight = nn.Parameter(layer.weight.chunk(size, dim=0)[rank])
        layer.out_features //= size
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.chunk(size)[rank])
    layer = _linear(part, last)
    layer.weight = nn.Parameter(layer.weight.chunk(size, dim=1)[rank])
    layer.in_features //= size
    if rank:
        layer.register_parameter("bias", None)
    divide_heads(part, size)
    return part


def _linear(module: nn.Module, name: str) -> nn.Linear:
    layer = module.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


@torch.no_grad()
def _call(attention: nn.Module, inputs: Tensor) -> Tensor:
    """Attention of tokens to themselves: called with them once or as queries, keys and values."""
    try:
        outputs = attention(inputs)
    except TypeError:
        outputs = attention(inputs, inputs, inputs)
    found: Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
    return found


# --- torch's own -----------------------------------------------------------------------------------


def _why_not_torchs(module: nn.MultiheadAttention, size: int) -> str | None:
    if module.num_heads % size:
        return f"{size} workers cannot split {module.num_heads} heads"
    if module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn:
        return "it has kdim, vdim, add_bias_kv or add_zero_attn"
    return None


def packed_shapes(model: nn.Module) -> Iterator[tuple[str, torch.Size]]:
    """The names and whole shapes of what `Heads` holds as three matrices: to be called before it is applied."""
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            for field in ("in_proj_weight", "in_proj_bias"):
                if getattr(module, field) is not None:
                    yield f"{name}.{field}" if name else field, getattr(module, field).shape


class Heads(ParallelStyle):
    """`nn.MultiheadAttention`, each worker with some of the heads. It gives no attention weights."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, nn.MultiheadAttention):
            raise SpecError(f"strategy.tp.plan: 'heads' splits an nn.MultiheadAttention, not a {type(module).__name__}")
        width = module.embed_dim
        _split(module, "in_proj_weight", (3, width, width), dim=1, mesh=device_mesh)
        if module.in_proj_bias is not None:
            _split(module, "in_proj_bias", (3, width), dim=1, mesh=device_mesh)
        _split(module.out_proj, "weight", (width, width), dim=1, mesh=device_mesh)
        module.forward = MethodType(_attend, module)  # type: ignore[method-assign]
        vars(module)["heads_mesh"] = device_mesh
        return module


def _split(module: nn.Module, name: str, shape: tuple[int, ...], *, dim: int, mesh: DeviceMesh) -> None:
    old: nn.Parameter = getattr(module, name)
    spread = distribute_tensor(old.detach().reshape(shape), mesh, [Shard(dim)])
    module.register_parameter(name, nn.Parameter(spread, requires_grad=old.requires_grad))


def _attend(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, None]:
    """`nn.MultiheadAttention.forward` with this worker's heads, for inputs of three dimensions."""
    mesh: DeviceMesh = self.heads_mesh
    rank, size = mesh.get_local_rank(), mesh.size()
    inputs = (query, key, value) if self.batch_first else tuple(t.transpose(0, 1) for t in (query, key, value))
    weights = self.in_proj_weight.to_local()
    biases = self.in_proj_bias.to_local() if self.in_proj_bias is not None else (None,) * 3
    heads, head_dim = self.num_heads // size, self.head_dim
    q, k, v = (
        functional.linear(_to_all(tokens, mesh), weight, bias).view(*tokens.shape[:2], heads, head_dim).transpose(1, 2)
        for tokens, weight, bias in zip(inputs, weights, biases)
    )
    mask = _mask(attn_mask, key_padding_mask, q, num_heads=self.num_heads, first_head=rank * heads)
    dropout = self.dropout if self.training else 0.0
    found = functional.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout).transpose(1, 2).flatten(2)
    partial = functional.linear(found, self.out_proj.weight.to_local())
    outputs = DTensor.from_local(partial, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()])
    whole = outputs.to_local()
    if self.out_proj.bias is not None:
        whole = whole + self.out_proj.bias
    return whole if self.batch_first else whole.transpose(0, 1), None


def _to_all(tokens: Tensor, mesh: DeviceMesh) -> Tensor:
    """The same tokens; their gradient is the sum of those of all workers."""
    return DTensor.from_local(tokens, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def _mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, *, num_heads: int, first_head: int
) -> Tensor | None:
    """What is added to the scores, for this worker's heads: both of torch's masks, where True is left out."""
    added: Tensor | None = None
    if attn_mask is not None:
        added = _as_added(attn_mask, q.dtype)
        if added.dim() == 3:  # one for each sample and head
            added = added.view(-1, num_heads, *added.shape[1:])[:, first_head : first_head + q.size(1)]
    if key_padding_mask is not None:
        padding = _as_added(key_padding_mask, q.dtype)[:, None, None, :]
        added = padding if added is None else added + padding
    return added


def _as_added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask
