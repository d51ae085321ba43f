"""One worker that trains small models under one strategy: `python strategy_worker.py STRATEGY RANK SIZE FOLDER [END]`.

With `begun` as the end the run is interrupted; with a number it goes on where so many workers were interrupted.

What test_strategies.py compares is left in `FOLDER/{strategy}-{size}.pt`, as rank 0 saw it.
"""

import os
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from heliostat.errors import StageError
from heliostat.training import devices
from heliostat.training.checkpoints import Checkpoints
from heliostat.training.config import TrainConfig
from heliostat.training.loop import Fit, fit
from heliostat.training.task import Metric, Objective
from heliostat.training.user_loop import TrainContext, run_user_loop
from heliostat.training.world import World


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    return (outputs.argmax(dim=1) == targets).double().mean().item()


def total(outputs: Tensor, targets: Tensor) -> float:
    return (outputs[:, 0] * torch.arange(len(outputs))).sum().item()


def smoothed(model: nn.Module, batch: tuple[Any, ...]) -> Tensor:
    """A user's own step."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1)


def plain_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    """A mean over samples in a function of the user's."""
    return nn.functional.cross_entropy(outputs, targets)


METRICS = (Metric("accuracy", accuracy, "max"), Metric("total", total, "max"))
OBJECTIVE = Objective(nn.functional.cross_entropy, METRICS)
OBJECTIVES = {
    "mlp": Objective(plain_mean, METRICS),
    "cnn": Objective(nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0])), METRICS),
}


class Positions(nn.Module):
    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(length, width))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.weight


class First(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]


class Block(nn.Module):
    """A transformer block as people write it."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.norm1(tokens)
        tokens = tokens + self.attention(normed, normed, normed, need_weights=False)[0]
        return tokens + self.fc2(nn.functional.gelu(self.fc1(self.norm2(tokens))))


class SplitAttention(nn.Module):
    """Attention of four linear layers, as people write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads = 2
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.o_proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length, _ = tokens.shape
        layers = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (layer(tokens).view(batch, length, self.num_heads, -1).transpose(1, 2) for layer in layers)
        found = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        outputs: Tensor = self.o_proj(found.transpose(1, 2).reshape(batch, length, -1))
        return outputs


def attention() -> nn.Module:
    """Its own attention, and torch's transformer layer, which has a fast path where it is evaluated."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(11, 8), SplitAttention(8), encoder, First(), nn.Linear(8, 3))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def cnn() -> nn.Module:
    layers = (nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def normed() -> nn.Module:
    layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(16, 3))


def transformer() -> nn.Module:
    layers = (nn.Embedding(11, 8), Positions(6, 8), nn.Sequential(Block(8), Block(8)), nn.LayerNorm(8), First())
    return nn.Sequential(*layers, nn.Linear(8, 3))


def heads() -> nn.Module:
    """As many heads as there are workers at most."""
    return nn.Sequential(nn.Embedding(11, 8), Positions(6, 8), Block(8, heads=4), First(), nn.Linear(8, 3))


def data_for(name: str, num_samples: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(num_samples)
    targets = torch.arange(num_samples) % 3
    if name in ("transformer", "attention", "heads"):
        return TensorDataset(torch.randint(0, 11, (num_samples, 6), generator=generator), targets)
    shape = (8,) if name == "mlp" else (1, 6, 6)
    inputs = torch.randn(num_samples, *shape, generator=generator) + targets.view(-1, *[1] * len(shape))
    return TensorDataset(inputs, targets)


SMALL_NODE_BYTES = 30_000
"""Too little for two whole copies of a model in training; enough for the parts of the small ones."""
MODELS = {"mlp": mlp, "cnn": cnn, "normed": normed, "transformer": transformer, "attention": attention, "heads": heads}
STRATEGIES: dict[str, Any] = {
    "auto": "auto",
    "single": "single",
    "ddp": "ddp",
    "fsdp": {"fsdp": {"wrap": 100}},
    "fsdp-by-class": {"fsdp": {"wrap": "Linear"}},
    "tp": "tp",
    "tp-by-plan": {
        "tp": {"plan": {"2.*.fc1": "colwise", "2.*.fc2": "rowwise", "2.*.norm2": "sequence", "3": "sequence"}}
    },
    "pp": {"pp": {"microbatches": 4}},
    "gpipe": {"pp": {"schedule": "gpipe", "microbatches": 2, "split": ["4"]}},
    "interleaved": {"pp": {"schedule": "interleaved", "microbatches": 4}},
    "dp-tp": {"mesh": {"dp": 2, "tp": 2}},
    "dp-pp": {"mesh": {"dp": 2, "pp": 2}, "pp": {"microbatches": 2}},
}


def train(
    name: str,
    strategy: Any,
    world: World,
    kept: Checkpoints | None = None,
    interrupt: int = 0,
    objective: Objective | None = None,
    **options: Any,
) -> Fit:
    """21 samples in batches of 8: the last of each epoch has five. 21 steps, of which each is validated after."""

    def on_epoch(epoch: int, row: Any) -> None:
        if epoch == interrupt:
            raise KeyboardInterrupt

    torch.manual_seed(0)
    config = TrainConfig(
        **{
            "epochs": 7,
            "batch_size": 8,
            "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
            "strategy": strategy,
            "clip_grad_norm": 0.5,
            "ema_decay": 0.6,
            "scheduler": {"name": "cosine", "warmup_epochs": 1},
            "validate_every_steps": 1,
            "monitor": "val_loss",
            **options,
        }
    )
    data = {"train": data_for(name, 21), "val": data_for(name, 13)}
    model, objective = MODELS[name](), objective or OBJECTIVES.get(name, OBJECTIVE)
    return fit(model, data, config, objective=objective, seed=3, world=world, checkpoints=kept, on_epoch=on_epoch)


def result(found: Fit) -> dict[str, Any]:
    return {
        "history": found.history,
        "validations": found.validations,
        "state": found.state,
        "epoch": found.epoch,
        "taken": found.choice.get("strategy", {}).get("taken"),
    }


def interrupted(strategy: Any, world: World, kept: Checkpoints) -> None:
    """A run that ends in its fifth epoch, so that it goes on after the fourth."""
    with suppress(KeyboardInterrupt):
        train("transformer", strategy, world, kept, interrupt=5, deterministic=True)


def own_loop(context: TrainContext, config: TrainConfig) -> None:
    """A user's own loop, of 20 steps, with all there is; what it restores it loads once the model is spread."""
    data = data_for("transformer", 16)
    model, loader = context.prepare(transformer(), DataLoader(data, batch_size=config.batch_size))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    begun = context.restore()
    if begun is not None:
        model.load_state_dict(begun["model"])
        optimizer.load_state_dict(begun["optimizer"])
    for epoch in range(begun["epoch"] if begun else 0, config.epochs):
        losses = []
        for inputs, targets in loader:
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            context.clip_gradients(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        mean = torch.stack(losses).mean()
        if context.world_size > 1:
            dist.all_reduce(mean)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
        context.report({"val_loss": mean.item() / context.world_size}, checkpoint=state)


def early_optimizer(context: TrainContext, config: TrainConfig) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, loader = context.prepare(model, DataLoader(data_for("mlp", 8), batch_size=8))
    for inputs, _ in loader:
        model(inputs).sum().backward()
        optimizer.step()


def train_own(function: str, strategy: Any, world: World, kept: Checkpoints | None = None, interrupt: int = 0) -> Fit:
    def on_epoch(epoch: int, row: Any) -> None:
        if epoch == interrupt:
            raise KeyboardInterrupt

    sys.modules["strategy_worker"] = sys.modules["__main__"]
    loss = "torch.nn.functional:cross_entropy"
    task: Any = SimpleNamespace(train_fn=f"strategy_worker:{function}", train_step=None, loss=loss, metrics=())
    config = TrainConfig(epochs=10, batch_size=8, strategy=strategy)
    return run_user_loop(task, config, world=world, seed=0, on_epoch=on_epoch, checkpoints=kept)


def own_loops(strategy: Any, world: World, folder: Path) -> dict[str, Any]:
    """The own loop without a break, and with one after its fifth epoch."""
    kept = Checkpoints(folder)
    with suppress(KeyboardInterrupt):
        train_own("own_loop", strategy, world, kept, interrupt=6)
    return {
        "own_loop": result(train_own("own_loop", strategy, world)),
        "own_loop_resumed": result(train_own("own_loop", strategy, world, kept)),
    }


def main(name: str, rank: int, size: int, folder: Path, end: str = "") -> None:
    torch.set_num_threads(1)
    if name == "auto":
        devices.node_memory_bytes = lambda: SMALL_NODE_BYTES
    world, strategy = World(rank=rank, size=size), STRATEGIES[name]
    if size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder / f'meet-{name}-{size}'}", rank=rank, world_size=size
        )
    if end == "begun":
        interrupted(strategy, world, Checkpoints(folder / f"begun-{name}-{size}"))
        dist.destroy_process_group()
        return
    if end:
        found = train("transformer", strategy, world, Checkpoints(folder / f"begun-{name}-{end}"), deterministic=True)
        if rank == 0:
            torch.save(result(found), folder / f"{name}-{end}-to-{size}.pt")
        dist.destroy_process_group()
        return
    models = ["transformer"] if name in ("tp-by-plan", "gpipe") else ["mlp", "cnn", "transformer"]
    if name in ("single", "tp", "dp-tp"):
        models += ["attention", "heads"]
    if name in ("single", "ddp", "fsdp"):
        models.append("normed")
    if name == "interleaved" or (name == "pp" and size == 4):  # an MLP of three layers has no four stages
        models.remove("mlp")
    results: dict[str, Any] = {model: result(train(model, strategy, world)) for model in models}
    if size > 1 and name in ("fsdp", "tp", "pp"):
        kept = Checkpoints(folder / f"kept-{name}")
        interrupted(strategy, world, kept)
        results["resumed"] = result(train("transformer", strategy, world, kept, deterministic=True))
        results["uninterrupted"] = result(train("transformer", strategy, world, deterministic=True))
    own_step = replace(OBJECTIVE, train_step=smoothed)
    if name in ("single", "ddp", "fsdp", "tp"):
        results["own_step"] = result(train("mlp", strategy, world, objective=own_step))
    if name in ("single", "tp", "dp-tp"):
        results["own_step_heads"] = result(train("heads", strategy, world, objective=own_step))
    if name in ("single", "auto", "fsdp", "tp", "dp-tp"):
        results |= own_loops(strategy, world, folder / f"own-{name}-{size}")
    if size > 1 and name in ("fsdp", "tp"):
        try:
            train_own("early_optimizer", strategy, world)
        except StageError as error:
            results["early_optimizer"] = str(error)
    if rank == 0:
        torch.save(results, folder / f"{name}-{size}.pt")
    if size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), *sys.argv[5:])
    os._exit(0)  # gloo's threads now and then abort a process that ends in order
