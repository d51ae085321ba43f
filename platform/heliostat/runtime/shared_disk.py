"""Whether every machine of a cluster sees the folder that a run works in.

Stages run wherever there is room, and leave their files, checkpoints and journals in that folder. Where a machine has
one of its own under the same path, what it makes never arrives, which would be noticed hours later, by what is missing.
"""

import uuid
from pathlib import Path

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from heliostat.errors import SpecError

ANSWER_S = 60.0
"""A node that takes longer to start a process is not judged."""


def check_is_shared(folder: Path, *, is_bucket: bool) -> None:
    """Raise SpecError that names the nodes on which `folder` is not this machine's.

    `is_bucket` says that it is what this machine has of a bucket. One process on each node looks; where there is only
    one node, none does.
    """
    here = ray.get_runtime_context().get_node_id()
    nodes = {n["NodeID"]: n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")}
    others = {node: address for node, address in nodes.items() if node != here}
    if not others:
        return
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / f".seen-{uuid.uuid4().hex}"
    mark.touch()
    try:
        blind = [others[node] for node in _without(mark, list(others))]
    finally:
        mark.unlink()
    if blind:
        bucket = "; with a bucket a run works beside the file, and sends from there" if is_bucket else ""
        raise SpecError(
            f"storage: {len(blind)} of {len(nodes)} nodes do not see this machine's {folder}: {', '.join(blind)}. "
            f"On several machines it must be on a disk that all of them share{bucket}"
        )


def _without(mark: Path, nodes: list[str]) -> list[str]:
    """The nodes that answer that there is no such file."""
    looks = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        task = ray.remote(_sees).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
        looks[task.remote(str(mark))] = node
    answered, late = ray.wait(list(looks), num_returns=len(looks), timeout=ANSWER_S)
    for reference in late:
        ray.cancel(reference, force=True)
    return [looks[reference] for reference in answered if _answer(reference) is False]


def _answer(reference: "ray.ObjectRef") -> bool | None:
    try:
        answer: bool = ray.get(reference)
    except RayError:  # the node was lost meanwhile
        return None
    return answer


def _sees(mark: str) -> bool:
    return Path(mark).exists()
