"""Checkpoints of a model that is spread over workers (torch Distributed Checkpoint): one folder an epoch.

Each worker writes its own parts; what is read is what a worker needs of them, so any number of workers, in any mesh,
takes up what others left. A folder gets its name, which has the digest of all its files, when it is complete. Beside
the parts lies `plain.pt`: what is not a tensor, the same on all workers.

Workers need not see one folder. On each machine the first of those who share one gives it its name and sends it; the
first of all does so when the others have, and none deletes an older checkpoint before that. Who reads fetches the rest.
"""

import shutil
import uuid
from collections import ChainMap
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, distribute_tensor

from heliostat.core.state import with_metadata_of
from heliostat.training.checkpoints import Checkpoints, State, digest_parts, folder_name
from heliostat.training.strategies.parallel import Weights
from heliostat.training.trainee import Trainee
from heliostat.training.world import World, from_first_worker

PLAIN, METADATA = "plain.pt", ".metadata"


def save_parts(
    checkpoints: Checkpoints, trainee: Trainee, progress: Mapping[str, Any], *, epoch: int, is_best: bool, world: World
) -> None:
    """Write the state after `epoch`. Every worker calls it."""
    aside = checkpoints.folder / from_first_worker(f"epoch-{epoch:05d}.{uuid.uuid4().hex[:8]}.tmp", world=world)
    is_first_here = _make_first(aside, world=world)
    if world.rank == 0:
        torch.save({**_plain(trainee), "progress": dict(progress)}, aside / PLAIN)
    save(_tensors(trainee), checkpoint_id=aside)

    own = [*aside.glob(f"__{world.rank}_*"), *((aside / PLAIN, aside / METADATA) if world.rank == 0 else ())]
    digests: list[dict[str, str]] = [{}] * world.size
    dist.all_gather_object(digests, digest_parts(own))
    name = folder_name(ChainMap(*digests), epoch=epoch, is_best=is_best)
    for turn in (False, True):
        if is_first_here and turn == (world.rank == 0):
            checkpoints.carrier.send(checkpoints.keep_folder(aside, name))
        dist.barrier()
    if is_first_here:
        checkpoints.prune(newest=name)
        for unfinished in checkpoints.folder.glob("epoch-?????.????????.tmp"):  # of who was killed while it wrote
            shutil.rmtree(unfinished)


def _make_first(folder: Path, *, world: World) -> bool:
    """Make a new folder; whether this worker did so, of those who share it: rank 0 does of those who share its own."""
    if world.rank == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    with suppress(FileExistsError):
        if world.rank != 0:
            folder.mkdir(parents=True)
        return True
    return False


def restore_parts(checkpoints: Checkpoints, trainee: Trainee, *, world: World) -> tuple[State, Weights] | None:
    """Take up the newest intact state; its progress, and this worker's part of its best epoch's weights."""
    found = from_first_worker(checkpoints.newest_folders() if world.rank == 0 else None, world=world)
    if found is None:
        return None
    newest, best = found
    if world.rank != 0:
        for folder in found:
            checkpoints.carrier.fetch(folder)
    plain, plain_of_best = _read_plain(newest), _read_plain(best)
    if plain["progress"]["best_epoch"] != plain_of_best["progress"]["epoch"]:
        newest, plain = best, plain_of_best
    weights = _read_best(best, trainee)
    metadata = FileSystemReader(newest).read_metadata().state_dict_metadata
    tensors = _read(newest, _tensors(trainee) | _missing_optimizer_state(trainee, metadata))
    module = trainee.parallel.module
    module.load_state_dict(with_metadata_of(module.state_dict(), _below("model.", tensors)))
    for name, value in _below("optimizer.", tensors).items():
        parameter, _, field = name.rpartition(".")
        trainee.optimizer.state[_parameters(trainee)[parameter]][field] = value
    for group in trainee.optimizer.param_groups:
        group.update(plain["optimizer"])
    trainee.schedule.load_state_dict(plain["scheduler"])
    if trainee.ema is not None:
        trainee.ema.load_state_dict({"average": _below("ema.", tensors), "updates": plain["ema_updates"]})
    return plain["progress"], weights


def _parameters(trainee: Trainee) -> dict[str, Tensor]:
    return dict(trainee.parallel.module.named_parameters())


def _tensors(trainee: Trainee) -> dict[str, Tensor]:
    """All tensors of the state by name, as they are spread: `model.0.weight`, `optimizer.0.weight.exp_avg`."""
    tensors = {f"model.{name}": tensor for name, tensor in trainee.parallel.module.state_dict().items()}
    for name, parameter in _parameters(trainee).items():
        for field, value in trainee.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{name}.{field}"] = value
    average = trainee.ema.average if trainee.ema is not None else {}
    return tensors | {f"ema.{name}": tensor for name, tensor in average.items()}


def _plain(trainee: Trainee) -> dict[str, Any]:
    group = trainee.optimizer.param_groups[0]
    return {
        "optimizer": {name: value for name, value in group.items() if name != "params"},
        "scheduler": trainee.schedule.state_dict(),
        "ema_updates": trainee.ema.updates if trainee.ema is not None else 0,
    }


def _read_plain(folder: Path) -> State:
    state: State = torch.load(folder / PLAIN, weights_only=True)
    return state


def _missing_optimizer_state(trainee: Trainee, metadata: Mapping[str, Any]) -> dict[str, Tensor]:
    """Empty tensors for what an optimizer that has made no step yet is to be given, spread as its parameters are."""
    parameters, empty = _parameters(trainee), {}
    for key, saved in metadata.items():
        name, _, _field = key.removeprefix("optimizer.").rpartition(".")
        if key.startswith("optimizer.") and name in parameters:
            like = parameters[name].detach()
            whole = len(saved.size) > 0 and saved.size.numel() == like.numel()
            empty[key] = torch.zeros_like(like) if whole else torch.zeros(saved.size, dtype=saved.properties.dtype)
    return empty


def _read_best(folder: Path, trainee: Trainee) -> Weights:
    """The weights that count of a checkpoint, as this worker has them."""
    tensors = {key: t for key, t in _tensors(trainee).items() if not key.startswith("optimizer.")}
    copies = _read(folder, {key: tensor.detach().clone() for key, tensor in tensors.items()})
    average = _below("ema.", copies)
    averaged = trainee.ema.under_every_name(average) if trainee.ema is not None else {}
    return with_metadata_of(trainee.parallel.module.state_dict(), {**_below("model.", copies), **averaged})


def _read(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What was saved under the names of the tensors: in them, or in others that are spread as they are.

    Others for what is one matrix under some numbers of workers and three under others, as in `tp_attention.py`.
    """
    saved: Mapping[str, Any] = FileSystemReader(folder).read_metadata().state_dict_metadata
    read = dict(tensors)
    for name, tensor in tensors.items():
        if name in saved and saved[name].size != tensor.shape and saved[name].size.numel() == tensor.numel():
            read[name] = torch.empty(saved[name].size, dtype=tensor.dtype)
    load(read, checkpoint_id=folder)
    return {name: tensor if read[name] is tensor else _like(tensor, read[name]) for name, tensor in tensors.items()}


def _like(tensor: Tensor, whole: Tensor) -> Tensor:
    """The same values in the shape of the tensor, of which each worker has the part that it has of that."""
    values = whole.reshape(tensor.shape).to(tensor.device)
    if not isinstance(tensor, DTensor):
        return values
    return distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None)


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
