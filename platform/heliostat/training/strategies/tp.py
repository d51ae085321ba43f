"""`tp`: single layers split over the workers (tensor parallel; Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053).

A plan says how a layer is split: `colwise` by its outputs, `rowwise` by its inputs, `sequence` (norms, dropout) by the
second dimension of its activations. What the plan does not name is a whole copy on every worker. Layers take and
give whole activations, except between a `colwise` and the `rowwise` after it, which keep theirs split.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from itertools import pairwise

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
from heliostat.training.losses import LossRule
from heliostat.training.strategies.gradients import average_gradients
from heliostat.training.strategies.parallel import Parallel, copy_of_part, whole_on_cpu
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
    model.to(world.device)
    plan = auto_plan(model, sizes["tp"]) if config.plan == "auto" else named_layers(model, config.plan)
    styles = {name: STYLES[style]() for name, style in plan.items()}
    parallelize_module(model, mesh["tp"], styles)
    data = World(mesh["dp"].get_local_rank(), sizes["dp"], world.device, mesh["dp"].get_group())

    def backward(batch: Batch, share: Share, rule: LossRule) -> Tensor:
        loss = rule.loss(model, batch)
        rule.backward(loss if share.weight == 1.0 else loss * share.weight)
        return loss.detach()

    return Parallel(
        model,
        model,
        backward,
        world=world,
        data=data,
        end_backward=lambda: average_gradients(model.parameters(), data=data),
        is_sharded=True,
        keep=copy_of_part,
        gather=whole_on_cpu,
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


def auto_plan(model: nn.Module, size: int) -> dict[str, TpStyle]:
    """Two linear layers after another, the first split by its outputs and the second by its inputs.

    Found are the blocks of an `nn.Sequential` whose layers between the two work on each element alone, and those with
    names that are common for an MLP, such as `linear1` and `linear2` of torch's transformer layers. Attention stays
    whole. Raises SpecError when nothing is found.
    """
    plan: dict[str, TpStyle] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for first, second in _pairs(module):
            wide, narrow = module.get_submodule(first), module.get_submodule(second)
            if not isinstance(wide, nn.Linear) or not isinstance(narrow, nn.Linear) or prefix + first in plan:
                continue
            if wide.out_features == narrow.in_features and wide.out_features % size == 0:
                plan |= {prefix + first: "colwise", prefix + second: "rowwise"}
    if not plan:
        raise SpecError(f"strategy.tp.plan: found no two linear layers that {size} workers can split; write a plan")
    return plan


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
    "sequence": _Sequence,
}
