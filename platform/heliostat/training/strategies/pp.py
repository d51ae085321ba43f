"""`pp`: the model's layers dealt out over the workers, a batch running through in microbatches (pipeline parallel).

The model must be a chain: its modules, called one after another, are its forward pass. Schedules are torch's: gpipe
(Huang et al. 2019, https://arxiv.org/abs/1811.06965), 1f1b and interleaved (Narayanan et al. 2021,
https://arxiv.org/abs/2104.04473). All microbatches have one size: a short batch is filled up with repeated samples,
which do not count.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.nn.modules.batchnorm import _BatchNorm

from heliostat.core.state import map_state, with_metadata_of
from heliostat.errors import SpecError, nearest
from heliostat.training.batches import Batch, Share
from heliostat.training.config import PpConfig
from heliostat.training.losses import LossRule, LossSum, in_full_precision, summed
from heliostat.training.strategies.gradients import average_gradients
from heliostat.training.strategies.parallel import Parallel, Weights, copy_of_part, whole_on_cpu
from heliostat.training.world import World, from_worker

Chain = list[tuple[str, nn.Module]]
SCHEDULES: dict[str, Any] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B}


@dataclass
class _Current:
    """What the loss function of torch's schedule, made once, has to know of the share that runs through."""

    batch: Batch = ()
    share: Share | None = None
    rule: LossRule | None = None
    found: dict[int, tuple[LossSum, bool]] = field(default_factory=dict)
    """The loss of each microbatch, by its first row, and whether it was a sum. Torch's schedule tries the first out."""

    def loss(self, outputs: Tensor, rows: Tensor) -> Tensor:
        """A microbatch's part of the loss of the global batch; rows beyond the share's samples do not count."""
        if self.rule is None or self.share is None:
            return outputs.sum() * 0
        looked_at = rows < max(1, self.share.num_samples)
        if not looked_at.any():
            return outputs.sum() * 0
        batch = tuple(item[rows[looked_at]] if isinstance(item, Tensor) else item for item in self.batch)
        loss = self.rule.batch_loss(in_full_precision(outputs[looked_at]), batch)
        num_samples = min(self.share.num_samples, int(looked_at.sum()))
        self.found[int(rows[0])] = summed(loss, num_samples), not isinstance(loss, Tensor)
        return self.rule.part_of_mean(loss, self.share, num_samples)

    def total(self) -> tuple[LossSum, bool]:
        """The loss of the share, and whether it is a sum."""
        sums = [found for found, _ in self.found.values()]
        counts = float(self.share is not None and self.share.num_samples > 0)
        total, weight = (torch.stack(values).sum().cpu() * counts for values in zip(*sums))
        return LossSum(total, weight), any(is_sum for _, is_sum in self.found.values())


def pp(
    model: nn.Module,
    config: PpConfig,
    world: World,
    sizes: Mapping[str, int],
    *,
    batch_size: int,
    example: Callable[[], Tensor],
) -> Parallel:
    """Deal the model out over `sizes["pp"]` neighbours; `sizes["dp"]` such groups share each global batch.

    Raises SpecError for a model that is no chain, shares weights between stages, or has BatchNorm.
    """
    mesh = init_device_mesh(world.device.type, (sizes["dp"], sizes["pp"]), mesh_dim_names=("dp", "pp"))
    data = World(mesh["dp"].get_local_rank(), sizes["dp"], world.device, mesh["dp"].get_group())
    line = World(mesh["pp"].get_local_rank(), sizes["pp"], world.device, mesh["pp"].get_group())
    empty = map_state(model.state_dict(), lambda tensor: None)
    chain = chain_of(model.to(world.device), example())
    cuts = cut_points(chain, config, num_stages=line.size * config.stages_per_worker)
    _require_own_weights(chain, cuts)
    numbers = range(line.rank, len(cuts), line.size)
    part = _Part([chain[slice(*cuts[number])] for number in numbers])
    stages = [
        PipelineStage(piece, number, len(cuts), world.device, group=line.group)
        for number, piece in zip(numbers, part.pieces)
    ]
    current = _Current()
    schedule = SCHEDULES[config.schedule](
        stages if config.schedule == "interleaved" else stages[0],
        n_microbatches=config.microbatches,
        loss_fn=current.loss,
        scale_grads=False,
    )
    is_first, is_last = line.rank == 0, line.rank == line.size - 1
    share_size = -(-batch_size // sizes["dp"])
    num_rows = config.microbatches * -(-share_size // config.microbatches)
    rows = torch.arange(num_rows, device=world.device)

    def run(inputs: Tensor, call: Callable[..., Tensor | None], **options: Any) -> Tensor | None:
        filled = (inputs[rows.clamp(max=len(inputs) - 1)],) if is_first else ()
        return call(*filled, target=rows if is_last else None, **options)

    def backward(batch: Batch, share: Share, rule: LossRule) -> LossSum:
        current.batch, current.share, current.rule, current.found = batch, share, rule, {}
        with rule.autocast:
            run(batch[0], schedule.step)
        current.rule = None
        found, is_sum = from_worker(line.size - 1, current.total() if is_last else None, world=line)
        loss = LossSum(*(value.to(world.device) for value in found))
        rule.weigh(loss, share, is_sum=is_sum)
        return loss

    @torch.no_grad()
    def outputs(inputs: Tensor) -> Tensor:
        found = [run(some, schedule.eval) for some in torch.split(inputs, num_rows)]
        whole = torch.cat([o for o in found if o is not None])[: len(inputs)] if is_last else None
        result: Tensor = from_worker(line.size - 1, whole, world=line)
        return result

    return Parallel(
        part,
        outputs,
        backward,
        world=world,
        data=data,
        stages=line,
        end_backward=lambda: average_gradients(part.parameters(), data=data),
        is_sharded=True,
        keep=copy_of_part,
        gather=lambda weights: _gather(weights, empty=empty, line=line),
    )


def chain_of(model: nn.Module, example: Tensor) -> Chain:
    """The modules whose calls, one after another, are the model's forward pass; `nn.Sequential`s are opened.

    Raises SpecError when they give something else than the model for the example, a batch of one sample.
    """
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise SpecError("strategy: pp would take BatchNorm's statistics of microbatches; take GroupNorm")
    chain = list(links("", model))
    was_training = model.training
    with torch.no_grad():
        expected = model.eval()(example)
        try:
            found = example
            for _, module in chain:
                found = module(found)
            same = torch.equal(found, expected)
        except Exception:  # whatever a module says that is given the wrong thing
            same = False
    model.train(was_training)
    if not same:
        raise SpecError(
            f"strategy: pp cannot cut {type(model).__name__}: its modules, called one after another, give something "
            "else than its forward; make it a chain, such as an nn.Sequential"
        )
    return chain


def links(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules below one, in the order in which they were made; `nn.Sequential`s and lists are opened."""
    if name and not isinstance(module, nn.Sequential | nn.ModuleList):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from links(f"{name}.{child_name}" if name else child_name, child)


def cut_points(chain: Chain, config: PpConfig, *, num_stages: int) -> list[tuple[int, int]]:
    """Where each stage starts and stops in the chain: as the config says, or with about as many parameters each."""
    names = [name for name, _ in chain]
    heads = [number for number, (_, module) in enumerate(chain) if any(True for _ in module.parameters())]
    if len(heads) < num_stages:
        raise SpecError(f"strategy: {len(heads)} modules with parameters cannot be cut into {num_stages} stages")
    if config.split == "auto":
        ends = list(accumulate(sum(p.numel() for p in module.parameters()) for _, module in chain))
        starts, position = [0], 0
        for number in range(1, num_stages):
            goal = ends[-1] * number / num_stages
            room = range(position + 1, len(heads) - (num_stages - number) + 1)
            position = min(room, key=lambda place: abs(ends[heads[place] - 1] - goal))
            starts.append(heads[position])
    else:
        for name in config.split:
            if name not in names[1:]:
                raise SpecError(f"strategy.pp.split: no stage can begin with {name!r}{nearest(name, names[1:])}")
        starts = [0, *sorted(names.index(name) for name in config.split)]
        if len(starts) != num_stages:
            raise SpecError(f"strategy.pp.split: {len(starts)} stages, but the workers need {num_stages}")
    cuts = list(zip(starts, [*starts[1:], len(chain)]))
    for start, stop in cuts:
        if not any(start <= head < stop for head in heads):
            raise SpecError(f"strategy.pp.split: the stage that begins with {names[start]!r} has no parameters")
    return cuts


def _require_own_weights(chain: Chain, cuts: list[tuple[int, int]]) -> None:
    seen: dict[int, tuple[int, str]] = {}
    for number, cut in enumerate(cuts):
        for name, module in chain[slice(*cut)]:
            for parameter in module.parameters():
                other, where = seen.setdefault(id(parameter), (number, name))
                if other != number:
                    raise SpecError(f"strategy: {where} and {name} share a weight, but lie on different stages of pp")


class _Stage(nn.Sequential):
    """Modules called one after another. What goes to the neighbours, gradients too, must lie in one piece of memory."""

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.requires_grad:
            inputs.register_hook(Tensor.contiguous)  # type: ignore[no-untyped-call]
        outputs = inputs
        for module in self:
            outputs = module(outputs)
        return outputs.contiguous()


class _Part(nn.Module):
    """One worker's stages. Its parameters have the names that they have in the user's model."""

    pieces: tuple[nn.Module, ...]

    def __init__(self, pieces: list[Chain]) -> None:
        super().__init__()
        for path, module in (link for piece in pieces for link in piece):
            *parents, last = path.split(".")
            place: nn.Module = self
            for parent in parents:
                if parent not in dict(place.named_children()):
                    place.add_module(parent, nn.Module())
                place = place.get_submodule(parent)
            place.add_module(last, module)
        # A tuple is no registered submodule, so that no name is there twice.
        self.pieces = tuple(_Stage(*(module for _, module in piece)) for piece in pieces)


def _gather(weights: Mapping[str, Tensor], *, empty: Weights, line: World) -> Weights:
    """The state of the whole model; `empty` has its names and `_metadata`."""
    parts: list[Any] = [None] * line.size
    dist.all_gather_object(parts, whole_on_cpu(weights), group=line.group)
    merged = {name: tensor for part in parts for name, tensor in part.items()}
    return with_metadata_of(empty, {name: merged[name] for name in empty})
