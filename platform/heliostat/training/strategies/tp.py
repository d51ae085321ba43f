"""`tp`: single layers split over the workers (tensor parallel; Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053).

A plan says how a layer is split: `colwise` by its outputs, `rowwise` by its inputs, `heads` (`nn.MultiheadAttention`)
by its heads, `sequence` (norms, dropout) by the second dimension of its activations. What the plan does not name is a
whole copy on every worker. Layers take and give whole activations, except between a `colwise` and the `rowwise` after
it, which keep theirs split: neither goes without the other.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from heliostat.errors import SpecError, nearest
from heliostat.training.batches import Batch, Share
from heliostat.training.config import TpConfig, TpStyle
from heliostat.training.losses import LossRule, LossSum
from heliostat.training.strategies.gradients import average_gradients
from heliostat.training.strategies.parallel import Parallel, Weights, copy_of_part, whole_on_cpu
from heliostat.training.strategies.tp_attention import (
    Heads,
    divide_heads,
    head_counts,
    packed_shapes,
    projections,
    why_not_split,
)
from heliostat.training.world import World

PAIRS = (
    ("fc1", "fc2"),
    ("linear1", "linear2"),
    ("lin1", "lin2"),
    ("up_proj", "down_proj"),
    ("c_fc", "c_proj"),
    ("w1", "w2"),
    ("wi", "wo"),
)
"""What the two layers of an MLP block are called, in torch and in common model code."""


def tp(model: nn.Module, config: TpConfig, world: World, sizes: Mapping[str, int]) -> Parallel:
    """Split the model's layers over `sizes["tp"]` neighbours; `sizes["dp"]` such groups share each global batch."""
    mesh = init_device_mesh(world.device.type, (sizes["dp"], sizes["tp"]), mesh_dim_names=("dp", "tp"))
    plan = tp_plan(model, config, sizes["tp"])
    shapes = {name: shape for name, shape in packed_shapes(model) if plan.get(name.rpartition(".")[0]) == "heads"}
    model.to(world.device)
    for attention in _split_attentions(model, plan).values():
        divide_heads(attention, sizes["tp"])
    # The fast path of torch's transformer layers, taken in evaluation, reads whole weights past every forward.
    torch.backends.mha.set_fastpath_enabled(False)
    parallelize_module(model, mesh["tp"], {name: STYLES[style]() for name, style in plan.items()})
    data = World(mesh["dp"].get_local_rank(), sizes["dp"], world.device, mesh["dp"].get_group())

    def gather(weights: Weights) -> Weights:
        whole = whole_on_cpu(weights)
        for name, shape in shapes.items():
            whole[name] = whole[name].reshape(shape)
        return whole

    def backward(batch: Batch, share: Share, rule: LossRule) -> LossSum:
        return rule.backward(rule.loss(model, batch), share)

    return Parallel(
        model,
        model,
        backward,
        world=world,
        data=data,
        end_backward=lambda: average_gradients(model.parameters(), data=data),
        is_sharded=True,
        keep=copy_of_part,
        gather=gather,
    )


def named_layers(model: nn.Module, plan: Mapping[str, TpStyle]) -> dict[str, TpStyle]:
    """The layers that the plan's patterns match. Raises SpecError for a pattern that matches none."""
    names = [name for name, _ in model.named_modules() if name]
    found: dict[str, TpStyle] = {}
    for pattern, style in plan.items():
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches:
            raise SpecError(f"strategy.tp.plan: the model has no module {pattern!r}{nearest(pattern, names)}")
        found.update(dict.fromkeys(matches, style))
    return found


def tp_plan(model: nn.Module, config: TpConfig, size: int) -> dict[str, TpStyle]:
    """The style of each layer that is split over so many workers.

    Raises SpecError for a plan that names what the model does not have, or would not compute the same.
    """
    if config.plan == "auto":
        return auto_plan(model, size)
    plan = named_layers(model, config.plan)
    _check_pairs(model, plan, size)
    for name, attention in _split_attentions(model, plan).items():
        if (why := why_not_split(attention, size)) is not None:
            raise SpecError(f"strategy.tp.plan: the attention {name!r} cannot be split: {why}")
    return plan


def auto_plan(model: nn.Module, size: int) -> dict[str, TpStyle]:
    """The attention and MLP blocks that so many workers can split.

    An MLP is two linear layers after another, the first split by its outputs and the second by its inputs: in an
    `nn.Sequential` with nothing between them but what works on each element alone, and under names that are common,
    such as `linear1` and `linear2` of torch's transformer layers. An attention is `nn.MultiheadAttention`, or four
    linear layers under common names. Raises SpecError when nothing is found.
    """
    plan: dict[str, TpStyle] = {}
    tried: dict[tuple[Any, ...], str | None] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for first, second in _pairs(module):
            wide, narrow = module.get_submodule(first), module.get_submodule(second)
            if not isinstance(wide, nn.Linear) or not isinstance(narrow, nn.Linear) or prefix + first in plan:
                continue
            if wide.out_features == narrow.in_features and wide.out_features % size == 0:
                plan |= {prefix + first: "colwise", prefix + second: "rowwise"}
        layers = projections(module)
        if not layers and not isinstance(module, nn.MultiheadAttention):
            continue
        like = (type(module), repr(module), *(getattr(module, count) for count in head_counts(module)))
        if like not in tried:
            tried[like] = why_not_split(module, size)
        if tried[like] is not None:
            continue
        if isinstance(module, nn.MultiheadAttention):
            plan[name] = "heads"
        else:
            for layer in layers[:3]:
                plan[prefix + layer] = "colwise"
            plan[prefix + layers[3]] = "rowwise"
    if not plan:
        raise SpecError(f"strategy.tp.plan: found no layers that {size} workers can split; write a plan")
    return plan


def left_whole(model: nn.Module, plan: Mapping[str, TpStyle]) -> list[str]:
    """The modules with parameters of their own that every worker has a whole copy of."""
    split = [name for name, style in plan.items() if style != "sequence"]
    return [
        name
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
        and not any(name == other or name.startswith(f"{other}.") for other in split)
    ]


def _split_attentions(model: nn.Module, plan: Mapping[str, TpStyle]) -> dict[str, nn.Module]:
    """The attentions of four linear layers that the plan splits."""
    found = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        layers = projections(module)
        if layers and all(plan.get(prefix + layer) in ("colwise", "rowwise") for layer in layers):
            found[name] = module
    return found


def _check_pairs(model: nn.Module, plan: Mapping[str, TpStyle], size: int) -> None:
    """Raise SpecError for a layer whose split outputs no layer takes, or that would be given whole inputs."""
    linear = [
        (name, module, plan[name])
        for name, module in model.named_modules()
        if plan.get(name) in ("colwise", "rowwise") and isinstance(module, nn.Linear)
    ]
    for position, (name, module, style) in enumerate(linear):
        width, place = (module.out_features, "out") if style == "colwise" else (module.in_features, "in")
        if width % size:
            raise SpecError(f"strategy.tp.plan: {size} workers cannot split the {width} {place}puts of {name!r}")
        others = linear[position + 1 :] if style == "colwise" else linear[:position]
        fits = [
            other
            for other, layer, of in others
            if of != style
            and (
                width == (layer.in_features if style == "colwise" else layer.out_features)
                or other.rpartition(".")[0] == name.rpartition(".")[0]
            )
        ]
        if not fits and style == "colwise":
            raise SpecError(
                f"strategy.tp.plan: {name!r} is colwise, so each worker has a part of its {width} outputs, and no "
                f"rowwise layer after it takes {width} inputs; add the layer that does"
            )
        if not fits:
            raise SpecError(
                f"strategy.tp.plan: {name!r} is rowwise, so each worker takes a part of {width} inputs, and no colwise "
                f"layer before it gives {width} outputs; add the layer that does"
            )
    for name, module in model.named_modules():
        if isinstance(module, nn.Sequential):
            _check_chain(f"{name}." if name else "", module, plan)


def _check_chain(prefix: str, chain: nn.Sequential, plan: Mapping[str, TpStyle]) -> None:
    """In a Sequential what follows is known: after `colwise`, and what works on each element alone, comes `rowwise`."""
    working = [name for name, layer in chain.named_children() if not isinstance(layer, (*ELEMENTWISE, nn.Dropout))]
    for first, second in pairwise([prefix + name for name in working]):
        if plan.get(first) == "colwise" and plan.get(second) != "rowwise":
            raise SpecError(
                f"strategy.tp.plan: {first!r} is colwise and gives its outputs in parts to {second!r}, which is not "
                "rowwise and takes them whole"
            )


ELEMENTWISE = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.Identity)


def _pairs(module: nn.Module) -> list[tuple[str, str]]:
    children = dict(module.named_children())
    if not isinstance(module, nn.Sequential):
        return [pair for pair in PAIRS if set(pair) <= set(children)]
    working = [(name, child) for name, child in children.items() if not isinstance(child, ELEMENTWISE)]
    return [(first, second) for (first, _), (second, _) in pairwise(working)]


class _Sequence(SequenceParallel):
    """Takes and gives whole activations, where torch's own style takes and gives parts of them."""

    @staticmethod
    def _prepare_input_fn(sequence_sharding: tuple[Shard], mod: nn.Module, inputs: tuple[Tensor], mesh: DeviceMesh):  # type: ignore[no-untyped-def]
        whole = DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False)
        return whole.redistribute(placements=sequence_sharding)

    @staticmethod
    def _prepare_output_fn(use_local_output: bool, mod: nn.Module, outputs: DTensor, mesh: DeviceMesh) -> Tensor:
        return outputs.redistribute(placements=[Replicate()]).to_local()


STYLES: dict[TpStyle, type[ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "heads": Heads,
    "sequence": _Sequence,
}
