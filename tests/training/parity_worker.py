"""One worker of a run that test_ddp.py repeats with several worker counts: `python parity_worker.py RANK SIZE FOLDER`.

Each scenario leaves plain values and tensors in `FOLDER/{size}.pt`, as rank 0 saw them.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from heliostat.errors import StageError
from heliostat.training.checkpoints import Checkpoints
from heliostat.training.config import TrainConfig
from heliostat.training.loop import Fit, evaluate, fit
from heliostat.training.task import Metric, Objective
from heliostat.training.user_loop import TrainContext, run_user_loop
from heliostat.training.world import World


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    return (outputs.argmax(dim=1) == targets).double().mean().item()


def weighted_by_position(outputs: Tensor, targets: Tensor) -> float:
    return (outputs[:, 0] * torch.arange(len(outputs))).sum().item()


OBJECTIVE = Objective(nn.functional.cross_entropy, (Metric("accuracy", accuracy, "max"),))
SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.9}


def blobs(num_samples: int, *shape: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(num_samples)
    targets = torch.arange(num_samples) % 3
    inputs = torch.randn(num_samples, *shape, generator=generator) + targets.view(-1, *[1] * len(shape))
    return TensorDataset(inputs, targets)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def curve(world: World, folder: Path, **options: Any) -> dict[str, Any]:
    """81 samples in batches of 8: the eleventh batch of each epoch is a single sample. 22 steps."""
    weights: list[Tensor] = []
    result = fit(
        mlp(),
        {"train": blobs(81, 8), "val": blobs(31, 8)},
        TrainConfig(epochs=2, batch_size=8, optimizer=SGD, **options),
        objective=OBJECTIVE,
        seed=3,
        world=world,
        after_step=lambda model: weights.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone()),
    )
    return {"weights": torch.stack(weights), "history": result.history, "state": result.state}


def in_parts(world: World, folder: Path) -> dict[str, Any]:
    return curve(world, folder, accumulate_steps=2, clip_grad_norm=0.5)


def mean_over_tokens(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    losses = nn.functional.cross_entropy(outputs, targets, reduction="none", ignore_index=-1)
    return losses.sum(), (targets != -1).sum()


def tokens(num_samples: int) -> TensorDataset:
    """Sequences of five; how many of them count differs, and in the last ones none does."""
    generator = torch.Generator().manual_seed(num_samples)
    inputs = torch.randint(0, 7, (num_samples, 5), generator=generator)
    lengths = torch.randint(0, 5, (num_samples, 1), generator=generator)
    lengths[-3:] = 0
    return TensorDataset(inputs, torch.where(torch.arange(5) < lengths, (inputs + 1) % 7, -1))


class ClassesFirst(nn.Module):
    def forward(self, outputs: Tensor) -> Tensor:
        return outputs.transpose(1, 2)


def weighted(world: World, folder: Path) -> dict[str, Any]:
    """A loss that divides by what counts in it, as torch's and as the user's own; in parts and clipped."""
    own = Objective(mean_over_tokens)
    own_step = Objective(mean_over_tokens, train_step=lambda model, batch: mean_over_tokens(model(batch[0]), batch[1]))
    torchs = Objective(nn.CrossEntropyLoss(ignore_index=-1, weight=torch.arange(1.0, 8.0)))
    data = {"train": tokens(21), "val": tokens(11)}
    found = {}
    for name, objective, parts in (("own", own, 1), ("torch", torchs, 3), ("own_step", own_step, 2)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 7), ClassesFirst())
        config = TrainConfig(epochs=2, batch_size=8, optimizer=SGD, accumulate_steps=parts, clip_grad_norm=0.5)
        result = fit(model, data, config, objective=objective, seed=3, world=world)
        alone = evaluate(model, data["val"], objective, split="val", batch_size=4)
        found[name] = {"history": result.history, "state": result.state, "alone": alone["val_loss"]}
    return found


def exact_metrics(world: World, folder: Path) -> dict[str, float]:
    """Fewer samples than some worlds have workers, and more, never divisible."""
    objective = Objective(nn.functional.cross_entropy, (Metric("position", weighted_by_position, "max"),))
    return {
        f"{num_samples}_{name}": value
        for num_samples in (1, 2, 31)
        for name, value in evaluate(
            mlp(), blobs(num_samples, 8), objective, split="val", batch_size=4, world=world
        ).items()
    }


class Centres(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 16, generator=torch.Generator().manual_seed(1)))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs @ self.weight.T, targets)


def trained_loss(world: World, folder: Path) -> dict[str, Any]:
    data, model = {"train": blobs(41, 8), "val": blobs(31, 8)}, mlp()[:2]
    config = TrainConfig(epochs=2, batch_size=8, optimizer=SGD, accumulate_steps=2, clip_grad_norm=0.5)
    result = fit(model, data, config, objective=Objective(Centres()), seed=3, world=world)
    return {"state": {**result.state, **result.loss_state}, "val_loss": result.metrics["val_loss"]}


class ActivatedNorm(nn.BatchNorm2d):
    """Batch norm with its activation, as timm has it."""

    def forward(self, inputs: Tensor) -> Tensor:
        statistics = (self.running_mean, self.running_var, self.weight, self.bias)
        return nn.functional.batch_norm(inputs, *statistics, self.training, 0.2, self.eps).relu()


def batch_norm(world: World, folder: Path) -> dict[str, Any]:
    """41 samples in batches of 8 and one: several workers have nothing of it, or one sample each."""

    def train(**options: Any) -> dict[str, Any]:
        torch.manual_seed(0)
        layers = (nn.Conv2d(1, 4, 3), ActivatedNorm(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU())
        model = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8, momentum=None), nn.Linear(8, 3)
        )
        data = {"train": blobs(41, 1, 6, 6), "val": blobs(31, 1, 6, 6)}
        config = TrainConfig(epochs=2, batch_size=8, optimizer=SGD, monitor="val_loss", **options)
        result = fit(model, data, config, objective=OBJECTIVE, seed=3, world=world)
        model.load_state_dict(result.state)
        after = evaluate(model, data["val"], OBJECTIVE, split="val", batch_size=5)["val_loss"]
        return {"during": result.metrics["val_loss"], "after": after, "state": result.state, "history": result.history}

    return {
        "whole": train(),
        "in_parts": train(accumulate_steps=3, clip_grad_norm=0.5),
        "unsynced": train(sync_batch_norm=False),
    }


def left_over(world: World, folder: Path) -> dict[str, Any]:
    """Batch norm over 33 samples in batches of 32, over 11 in batches of 8 (three are left), and in parts of one."""
    found: dict[str, Any] = {}
    for num_samples, batch_size, parts in ((33, 32, 1), (11, 8, 1), (8, 8, 8)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
        data = {"train": blobs(num_samples, 8), "val": blobs(9, 8)}
        steps: list[int] = []
        fitted = fit(
            model,
            data,
            TrainConfig(epochs=2, batch_size=batch_size, accumulate_steps=parts, optimizer=SGD),
            objective=OBJECTIVE,
            seed=3,
            world=world,
            after_step=lambda model, steps=steps: steps.append(1),  # type: ignore[misc]
        )
        found[f"{num_samples} in {parts}"] = {"steps": len(steps), "note": fitted.notes.get("batches", "")}
    return found


def one_worker_stops(world: World, folder: Path) -> int:
    config = TrainConfig(epochs=5, batch_size=8)
    data = {"train": blobs(20, 8), "val": blobs(9, 8)}
    stop_last_rank: Callable[..., bool] = lambda epoch, row: epoch == 2 and world.rank == world.size - 1  # noqa: E731
    return fit(mlp(), data, config, objective=OBJECTIVE, seed=0, world=world, on_epoch=stop_last_rank).epochs


def resumed(world: World, folder: Path) -> dict[str, Any]:
    checkpoints = Checkpoints(folder / f"checkpoints-{world.size}")
    data = {"train": blobs(20, 8), "val": blobs(9, 8)}

    def train(epochs: int, kept: Checkpoints | None) -> Fit:
        config = TrainConfig(epochs=epochs, batch_size=8)
        return fit(mlp(), data, config, objective=OBJECTIVE, seed=0, world=world, checkpoints=kept)

    train(2, checkpoints)
    return {"resumed": train(4, checkpoints).state, "uninterrupted": train(4, None).state}


def unused_parameter(world: World, folder: Path) -> str:
    model = mlp()
    model.register_parameter("spare", nn.Parameter(torch.zeros(1)))
    try:
        data = {"train": blobs(20, 8), "val": blobs(9, 8)}
        fit(model, data, TrainConfig(epochs=1), objective=OBJECTIVE, seed=0, world=world)
    except StageError as error:
        return str(error)
    return "trained"


def loss_of_one_worker_is_nan(world: World, folder: Path) -> str:
    """On the last rank, in the last step of an epoch: nothing later in it tells the others."""
    data = {"train": blobs(24, 8), "val": blobs(9, 8)}
    steps = iter(range(1, 100))

    def explode(outputs: Tensor, batch: tuple[Any, ...]) -> Tensor:
        loss = OBJECTIVE.loss(outputs, batch[1])
        return loss * float("nan") if next(steps) == 6 and world.rank == world.size - 1 else loss

    try:
        fit(
            mlp(),
            data,
            TrainConfig(epochs=3, batch_size=8),
            objective=OBJECTIVE,
            seed=0,
            world=world,
            batch_loss=explode,
        )
    except StageError as error:
        answers = gathered(str(error), world)
        assert len(set(answers)) == 1
        return answers[0]
    return "trained"


def gathered(value: Any, world: World) -> list[Any]:
    everyone: list[Any] = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(everyone, value)
    return everyone


seen: list[list[int]] = []


def own_loop(context: TrainContext, config: TrainConfig) -> None:
    dataset = TensorDataset(torch.randn(11, 8), torch.zeros(11, dtype=torch.long), torch.arange(11))
    loader = DataLoader(dataset, batch_size=config.batch_size, shuffle=True)
    model, loader = context.prepare(mlp(), loader)
    for inputs, targets, numbers in loader:
        nn.functional.cross_entropy(model(inputs), targets).backward()
        seen.append(numbers.tolist())
    context.report({"val_loss": float(context.rank)}, checkpoint=model.state_dict())


def users_loop(world: World, folder: Path) -> dict[str, Any]:
    sys.modules["parity_worker"] = sys.modules["__main__"]
    task = SimpleNamespace(
        train_fn="parity_worker:own_loop", train_step=None, loss="torch.nn.functional:cross_entropy", metrics=()
    )
    result = run_user_loop(task, TrainConfig(batch_size=4), world=world, seed=0)  # type: ignore[arg-type]
    return {"names": list(result.state), "val_loss": result.metrics["val_loss"], "batches": gathered(seen, world)}


SCENARIOS = (
    curve,
    in_parts,
    weighted,
    exact_metrics,
    batch_norm,
    trained_loss,
    left_over,
    one_worker_stops,
    resumed,
    users_loop,
    loss_of_one_worker_is_nan,
    unused_parameter,
)


def main(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder / f'rendezvous-{size}'}", rank=rank, world_size=size
        )
    world = World(rank=rank, size=size)
    results = {scenario.__name__: scenario(world, folder) for scenario in SCENARIOS}
    if rank == 0:
        torch.save(results, folder / f"{size}.pt")
    if size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
