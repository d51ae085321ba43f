"""What the workers of a training compute on: how much memory each has to itself, and which of them share a node."""

import os
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from heliostat.training.world import World

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""Where a container reads how much memory it may have; `max` is as much as there is."""


@dataclass(frozen=True)
class Device:
    """What one worker computes on."""

    node: str
    memory_bytes: int
    """This worker's own part: what lies on one device, or on one node's CPUs, shares its memory evenly."""
    name: str = "cpu"
    """Which device of the node."""

    @property
    def is_cpu(self) -> bool:
        return self.name == "cpu"


def devices_of(world: World) -> tuple[Device, ...]:
    """Every worker's device, in order of rank. Every worker must call it."""
    mine = whole_device(world.device)
    found: list[Device] = [mine] * world.size
    if world.size > 1:
        dist.all_gather_object(found, mine, group=world.group)
    return shared(found)


def whole_device(device: torch.device) -> Device:
    """A device of this node, with all its memory."""
    node = socket.gethostname()
    if device.type == "cpu":
        return Device(node, node_memory_bytes())
    properties = torch.cuda.get_device_properties(device)
    return Device(node, properties.total_memory, name=f"{properties.name} {properties.uuid}")


def shared(devices: Sequence[Device]) -> tuple[Device, ...]:
    """The same, each with its part of the memory of what several name."""
    users = Counter((device.node, device.name) for device in devices)
    return tuple(replace(d, memory_bytes=d.memory_bytes // users[d.node, d.name]) for d in devices)


def node_memory_bytes() -> int:
    """The memory of this node, or of the container that this process is in."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.exists() else "max"
    return physical if limit == "max" else min(physical, int(limit))
