"""What a cluster can hold at once: a worker lies on one node, so what matters is each node and not their sum."""

import math
from dataclasses import dataclass


def amount(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus and math.isfinite(gpus) else "")


@dataclass(frozen=True)
class Capacity:
    """The CPUs and GPUs of every node, busy or not."""

    nodes: tuple[tuple[float, float], ...]

    def workers(self, cpus: float, gpus: float) -> float:
        """How many workers of so much each there can be."""
        return sum(min(_times(has[0], cpus), _times(has[1], gpus)) for has in self.nodes)

    def __str__(self) -> str:
        cpus, gpus = (sum(kind) for kind in zip(*self.nodes, strict=True))
        return amount(cpus, gpus) + (f" on {len(self.nodes)} nodes" if len(self.nodes) > 1 else "")


def _times(available: float, each: float) -> float:
    """How often one goes into the other. Ray counts in ten-thousandths, so that 0.1 goes into 1 ten times."""
    if each == 0 or math.isinf(available):
        return math.inf
    return round(available * 10_000) // round(each * 10_000)
