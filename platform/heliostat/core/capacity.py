"""What workers hold and what a cluster can hold at once, by Ray's names of resources.

A worker lies on one node, so what matters is each node and not their sum.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

ACCELERATOR = "accelerator_type:"
"""Ray's name of a node's kind of accelerator begins so."""
OF_THE_NODE = ("node:", "memory", "object_store_memory")
"""What a node says of itself, and no worker holds by our means."""


@dataclass(frozen=True)
class Need:
    """So many workers at once, each with so much of one node."""

    workers: int
    each: Mapping[str, float]

    def of(self, resource: str) -> float:
        """How much of a resource all of them hold."""
        return self.workers * self.each.get(resource, 0.0)

    def __str__(self) -> str:
        return amount({name: self.of(name) for name in self.each})


NOTHING = Need(0, {})


def amount(held: Mapping[str, float]) -> str:
    """`2 CPUs and 0.5 GPUs`, `1 CPUs, 1 GPUs and accelerator A100`."""
    parts = [f"{held.get('CPU', 0):g} CPUs"]
    for name, count in held.items():
        if name.startswith(ACCELERATOR):
            parts.append(f"accelerator {name.removeprefix(ACCELERATOR)}")
        elif name != "CPU" and count and math.isfinite(count):
            parts.append(f"{count:g} {'GPUs' if name == 'GPU' else name}")
    return ", ".join(parts[:-1]) + f" and {parts[-1]}" if len(parts) > 1 else parts[0]


@dataclass(frozen=True)
class Capacity:
    """What every node has, busy or not."""

    nodes: tuple[Mapping[str, float], ...]
    unsaid: float = 0.0
    """How much a node has of what it does not name."""

    @classmethod
    def of(cls, nodes: Iterable[Mapping[str, float]]) -> "Capacity":
        """From the resources that Ray tells of each node."""
        return cls(tuple({k: v for k, v in node.items() if not k.startswith(OF_THE_NODE)} for node in nodes))

    def workers(self, each: Mapping[str, float]) -> float:
        """How many workers of so much each there can be."""
        return sum(
            min(_times(node.get(name, self.unsaid), held) for name, held in ({"CPU": 0.0} | dict(each)).items())
            for node in self.nodes
        )

    def __str__(self) -> str:
        total: dict[str, float] = {}
        for node in self.nodes:
            for name, count in node.items():
                total[name] = total.get(name, 0.0) + count
        return amount(total) + (f" on {len(self.nodes)} nodes" if len(self.nodes) > 1 else "")


def _times(available: float, each: float) -> float:
    """How often one goes into the other. Ray counts in ten-thousandths, so that 0.1 goes into 1 ten times."""
    if each == 0 or math.isinf(available):
        return math.inf
    return round(available * 10_000) // round(each * 10_000)
