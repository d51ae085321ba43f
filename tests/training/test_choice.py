"""What `auto` takes on clusters that are written down here."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from heliostat.errors import StageError
from heliostat.training.checkpoints import Checkpoints
from heliostat.training.config import TrainConfig
from heliostat.training.devices import Device, shared
from heliostat.training.losses import LossRule
from heliostat.training.memory import Activations, Estimate, Parts
from heliostat.training.strategies import auto
from heliostat.training.strategies.auto import weigh
from heliostat.training.strategies.choice import Choice, choose
from heliostat.training.world import World

GB = 1_000_000_000


def gpus(nodes: int, per_node: int, gigabytes: int = 80) -> list[Device]:
    return [Device(f"node{node}", gigabytes * GB, f"gpu{gpu}") for node in range(nodes) for gpu in range(per_node)]


def model(gigabytes: float, *, activations: float = 0.01) -> Estimate:
    """So much of parameters, trained with Adam, and of activations for each sample."""
    parameters = round(gigabytes * GB)
    return Estimate(parameters, parameters, 2 * parameters, Activations(0.0, activations * GB, 0.0))


def parts(largest_unit: float = 1, *, split: float = 0, largest_stage: float = 0) -> Parts:
    return Parts(round(largest_unit * GB), round(split * GB), round(largest_stage * GB))


ONE_NODE, TWO_NODES, APART = gpus(1, 8), gpus(2, 4), gpus(2, 1)


def taken(estimate: Estimate, devices: list[Device], found: Parts | None = None, **options: Any) -> Choice:
    return choose(estimate, devices, parts=found or parts(), **{"batch_size": 64, **options})


@pytest.mark.parametrize(
    ("devices", "estimate", "found", "mesh"),
    [
        (gpus(1, 1), model(100), parts(), "single"),
        (ONE_NODE, model(4), parts(), "ddp"),
        (ONE_NODE, model(50), parts(), "fsdp"),
        (ONE_NODE, model(50), parts(20, split=45), "tp"),
        (ONE_NODE, model(50), parts(20, largest_stage=8), "pp"),
        (TWO_NODES, model(4), parts(), "ddp"),
        (TWO_NODES, model(30), parts(split=28), "dp 2 x tp 4"),
        (TWO_NODES, model(50), parts(split=2, largest_stage=7), "pp"),
        (TWO_NODES, model(50), parts(split=2, largest_stage=40), "fsdp"),
        (APART, model(15), parts(), "ddp"),
        (APART, model(30), parts(largest_stage=15), "pp"),
        (gpus(2, 1)[:1] + gpus(2, 2)[2:], model(50), parts(largest_stage=12), "pp"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_fits_is_taken_the_best_for_the_links_first(
    devices: list[Device], estimate: Estimate, found: Parts, mesh: str
) -> None:
    assert taken(estimate, devices, found, refused={} if found.split else {"tp": "no layers to split"}).mesh == mesh


def test_the_reason_says_what_did_not_fit_and_why() -> None:
    found = taken(model(50), ONE_NODE, parts(20, split=45), refused={"pp": "it is no chain"})
    assert found.reason == (
        "a whole copy takes 200 GB of a device's 80 GB; fsdp takes 91.3 GB, of which its largest unit alone, "
        "gathered, 60 GB; with tp it is 53.8 GB a worker"
    )
    assert found.record()["strategy"] == {"taken": "tp", "reason": found.reason, "device_mb": 80_000.0}
    assert [row["strategy"] for row in found.record()["memory"]] == ["ddp", "fsdp", "tp"]


def test_what_the_config_or_the_model_does_not_allow_is_not_taken() -> None:
    refused = {"pp": "BatchNorm", "tp": "no layers to split"}
    found = taken(model(30), APART, parts(largest_stage=15), refused=refused)
    assert found.mesh == "fsdp"
    assert "links between nodes are slow; pp is not possible (BatchNorm)" in found.reason


def test_where_nothing_fits_the_least_is_taken_and_said_so() -> None:
    found = taken(model(1000), ONE_NODE, refused={"tp": "no layers to split", "pp": "it is no chain"})
    assert (found.mesh, found.reason.rpartition("; ")[2]) == (
        "fsdp",
        "nothing fits, and this is the least: take more workers, or a smaller batch_size",
    )


def test_activations_of_a_large_batch_count_and_accumulation_makes_them_less() -> None:
    big = model(4, activations=1)
    assert taken(big, ONE_NODE, batch_size=320).mesh == "ddp"
    assert taken(big, ONE_NODE, batch_size=640, accumulate_steps=2).mesh == "ddp"
    assert "nothing fits" in taken(big, ONE_NODE, batch_size=640, refused={"tp": "", "pp": ""}).reason


def test_workers_on_cpus_share_the_memory_of_their_node_and_copies_of_the_state_lie_there_too() -> None:
    devices = shared([Device("a", 64 * GB)] * 4 + [Device("b", 64 * GB)] * 2)
    assert [device.memory_bytes // GB for device in devices] == [16, 16, 16, 16, 32, 32]
    assert taken(model(1.4), devices[:4]).mesh == "ddp"
    assert taken(model(1.7), devices[:4]).mesh == "fsdp"
    assert taken(model(1.7), [replace(device, name="gpu") for device in devices[:4]]).mesh == "ddp"


def test_two_workers_on_one_gpu_share_it() -> None:
    one, other = shared([Device("a", 80 * GB, "gpu0")] * 2 + [Device("a", 80 * GB, "gpu1")])[1:]
    assert (one.memory_bytes // GB, other.memory_bytes // GB) == (40, 80)


def layers(*widths: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(wide, narrow) for wide, narrow in pairwise(widths)))


@pytest.mark.parametrize(
    ("build", "options", "mesh", "told"),
    [
        (lambda: layers(*[1024] * 9), {}, "fsdp", "with fsdp it is"),
        (lambda: nn.Sequential(*layers(64, 9000, 64)), {}, "tp", "its largest unit alone, gathered, "),
        (
            lambda: nn.Sequential(layers(800, 800), nn.BatchNorm1d(800), layers(800, 800)),
            {},
            "ddp",
            "pp is not possible (it has BatchNorm",
        ),
        (lambda: layers(*[1000] * 5), {"precision": "fp16"}, "ddp", "fsdp is not possible (precision: with 'fsdp'"),
    ],
    ids=["layers", "one large block", "batch norm", "fp16"],
)
def test_how_far_a_model_can_be_split_is_read_off_its_layers(
    build: Any, options: dict[str, Any], mesh: str, told: str
) -> None:
    """On two GPUs, of each of which three quarters of a copy may take the usable part."""
    with torch.device("meta"):
        module = build()
    whole = 4 * sum(parameter.nbytes for parameter in module.parameters())
    devices = tuple(Device("here", round(0.95 * whole), name) for name in ("gpu0", "gpu1"))
    choice = weigh(module, TrainConfig(**options), devices, None, own_step=False)
    assert choice.mesh == mesh
    assert told in choice.reason


def leave_checkpoint(folder: Path, *, is_spread: bool) -> None:
    path = folder / f"epoch-00001.{'0' * 32}"
    if is_spread:
        path.mkdir()
        (path / ".metadata").touch()
    else:
        Path(f"{path}.pt").touch()


@pytest.mark.parametrize(
    ("are_spread", "gigabytes", "mesh"), [(None, 80, "ddp"), (True, 80, "fsdp"), (False, 80, "ddp"), (False, 0, "ddp")]
)
def test_a_training_that_goes_on_keeps_to_the_form_of_its_checkpoints(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, are_spread: bool | None, gigabytes: int, mesh: str
) -> None:
    monkeypatch.setattr(auto, "from_first_worker", lambda value, world: value)
    monkeypatch.setattr(auto, "devices_of", lambda world: tuple(gpus(1, world.size, gigabytes)))
    if are_spread is not None:
        leave_checkpoint(tmp_path, is_spread=are_spread)
    rule = LossRule(lambda outputs, batch: outputs.sum(), precision="fp32", device=torch.device("cpu"))
    found = auto.choose_strategy(
        layers(4, 4),
        TrainConfig(batch_size=8),
        World(0, 2),
        rule=rule,
        example=lambda: (torch.ones(1, 4),),
        own_step=False,
        checkpoints=Checkpoints(tmp_path),
    )
    assert found.mesh == mesh


def test_one_worker_cannot_go_on_from_parts(tmp_path: Path) -> None:
    leave_checkpoint(tmp_path, is_spread=True)
    with pytest.raises(StageError, match="of a model spread over workers; take 2 workers or more"):
        auto.choose_strategy(
            layers(4, 4),
            TrainConfig(),
            World(),
            rule=LossRule(lambda outputs, batch: outputs.sum(), precision="fp32", device=torch.device("cpu")),
            example=lambda: (torch.ones(1, 4),),
            own_step=False,
            checkpoints=Checkpoints(tmp_path),
        )
