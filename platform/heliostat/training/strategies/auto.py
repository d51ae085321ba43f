"""`auto` on the workers that are there: the model is estimated by the first of them, and all take what it chooses.

What can never be, or would not go on from the checkpoints that are there, is not chosen.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from heliostat.errors import SpecError, StageError
from heliostat.training.batches import Batch
from heliostat.training.checkpoints import Checkpoints
from heliostat.training.config import StrategyConfig, TrainConfig, why_not_spread
from heliostat.training.devices import Device, devices_of
from heliostat.training.losses import LossRule
from heliostat.training.memory import Activations, Parts, activations, estimate, num_bytes
from heliostat.training.strategies.choice import USABLE, Choice, choose, fits_whole, share_of
from heliostat.training.world import World, from_first_worker

WHOLE = StrategyConfig(name="ddp")


def choose_strategy(
    model: nn.Module,
    config: TrainConfig,
    world: World,
    *,
    rule: LossRule,
    example: Callable[[], Batch],
    own_step: bool,
    checkpoints: Checkpoints | None = None,
) -> Choice:
    """What `auto` takes for a model that lies on CPU. `example` gives a batch of one sample, on the world's device.

    Raises StageError for one worker where checkpoints are of a model that was spread.
    """
    is_spread = from_first_worker(checkpoints and world.rank == 0 and checkpoints.are_spread(), world=world)
    if world.size == 1:
        if is_spread:
            raise StageError("strategy: the checkpoints are of a model spread over workers; take 2 workers or more")
        return Choice(StrategyConfig(name="single"), "there is one worker")
    devices = devices_of(world)
    choice = None
    if world.rank == 0:
        measured = measure(model, world.device, devices, rule=rule, example=example)

        def inputs() -> torch.Tensor:
            found: torch.Tensor = example()[0]
            return found.to(next(model.parameters()).device)

        choice = weigh(model, config, devices, measured, own_step=own_step, example=inputs)
    taken: Choice = from_first_worker(choice, world=world)
    is_whole = taken.strategy.name == "ddp"
    if is_spread is None or is_spread != is_whole:
        return taken
    went_on = StrategyConfig(name="fsdp") if is_spread else WHOLE
    return replace(taken, strategy=went_on, reason=f"it goes on from checkpoints of {went_on.name}'s form")


def choose_for_own_loop(model: nn.Module, config: TrainConfig, world: World) -> Choice:
    """What `auto` takes under the user's own loop, by what can be known there: the weights, and `config.optimizer`.

    What the loop computes, and so its activations, is its own; and any strategy takes up its checkpoints.
    """
    if world.size == 1:
        return Choice(StrategyConfig(name="single"), "there is one worker")
    devices = devices_of(world)
    choice = weigh(model, config, devices, None, own_step=False, own_loop=True) if world.rank == 0 else None
    taken: Choice = from_first_worker(choice, world=world)
    return taken


def measure(
    model: nn.Module,
    device: torch.device,
    devices: tuple[Device, ...],
    *,
    rule: LossRule,
    example: Callable[[], Batch],
) -> Activations:
    """The activations, on the device where the model's weights fit there, else on CPU."""
    if num_bytes(model.parameters()) < USABLE * devices[0].memory_bytes:
        return activations(model.to(device), example(), rule)
    batch = tuple(item.cpu() if isinstance(item, torch.Tensor) else item for item in example())
    return activations(model, batch, rule.on(torch.device("cpu")))


def weigh(
    model: nn.Module,
    config: TrainConfig,
    devices: tuple[Device, ...],
    measured: Activations | None,
    *,
    own_step: bool,
    own_loop: bool = False,
    example: Callable[[], torch.Tensor] | None = None,
) -> Choice:
    """Choose for a model, which may lie on the meta device. Without an `example`, it is trusted to be a chain."""
    found = estimate(model, config.optimizer, averaged=config.ema_decay is not None, activations=measured)
    workers = len(devices)
    parts, refused = None, {}
    if not fits_whole(found, devices, share_of(config.batch_size, workers, config.accumulate_steps)):
        own = {"own_step": own_step, "own_loop": own_loop}
        refused = {name: why for name in ("fsdp", "tp", "pp") if (why := _refusal(config, name, workers, **own))}
        parts = _parts(model, config, devices, refused, example)
    return choose(
        found,
        devices,
        batch_size=config.batch_size,
        accumulate_steps=config.accumulate_steps,
        parts=parts,
        refused=refused,
    )


def _refusal(config: TrainConfig, name: str, workers: int, *, own_step: bool, own_loop: bool) -> str | None:
    asked = config.model_copy(update={"strategy": StrategyConfig.model_validate(name)})
    problems = why_not_spread(asked, workers=workers, own_loop=own_loop, own_step=own_step)
    return next(iter(problems), None)


def _parts(
    model: nn.Module,
    config: TrainConfig,
    devices: tuple[Device, ...],
    refused: dict[str, str],
    example: Callable[[], torch.Tensor] | None,
) -> Parts:
    """How far the model can be split; why it cannot goes into `refused`."""
    from heliostat.training.strategies.fsdp import units
    from heliostat.training.strategies.pp import chain_of, cut_points, links
    from heliostat.training.strategies.tp import auto_plan

    gathered = list(units(model, config.strategy.fsdp.wrap))
    inside = {id(p) for unit in gathered for p in unit.parameters()}
    rest = sum(p.nbytes for p in model.parameters() if id(p) not in inside)
    largest_unit = max([rest, *(num_bytes(unit.parameters()) for unit in gathered)])

    split = 0
    on_first_node = sum(device.node == devices[0].node for device in devices)
    try:
        plan = auto_plan(model, on_first_node)
        split = num_bytes(p for name in plan for p in model.get_submodule(name).parameters())
    except SpecError as error:
        refused.setdefault("tp", str(error).partition(": ")[2])

    largest_stage = 0
    try:
        if any(isinstance(module, _BatchNorm) for module in model.modules()):
            raise SpecError("strategy: it has BatchNorm, whose statistics would be those of microbatches")
        chain = chain_of(model, example()) if example is not None else list(links("", model))
        cuts = cut_points(chain, config.strategy.pp, num_stages=len(devices))
        stages = [[module for _, module in chain[start:stop]] for start, stop in cuts]
        largest_stage = max(num_bytes(p for module in stage for p in module.parameters()) for stage in stages)
    except SpecError as error:
        refused.setdefault("pp", str(error).partition(": ")[2])
    return Parts(largest_unit=largest_unit, split=split, largest_stage=largest_stage)
