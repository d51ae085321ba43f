"""Whether every machine of a cluster can come to what stages leave: a folder that all see, or a bucket.

Stages run wherever there is room, and leave their files, checkpoints and journals in the store's folder. Where a
machine has one of its own under the same path, what it makes goes by way of the bucket. Where there is none it never
arrives, which would be noticed hours later, by what is missing.
"""

import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from heliostat.core.plan import Plan
from heliostat.errors import HeliostatError, SpecError
from heliostat.mirror import try_bucket

ANSWER_S = 60.0
"""A node that takes longer to start a process is not judged."""


def check_storage(planned: Plan) -> None:
    """Raise SpecError that names the nodes on which the store's folder is not this machine's, unless a bucket will do.

    One process on each node looks; where there is only one node, none does.
    """
    folder, url = planned.pipeline.storage_folder, planned.pipeline.bucket_url
    here = ray.get_runtime_context().get_node_id()
    nodes = {n["NodeID"]: n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")}
    others = {node: address for node, address in nodes.items() if node != here}
    if not others:
        return
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / f".seen-{uuid.uuid4().hex}"
    mark.touch()
    try:
        answers = [(others[node], answer) for node, answer in _asked(list(others), mark, url).items()]
    finally:
        mark.unlink()
    check_answers(planned, answers, num_nodes=len(nodes))


def check_answers(planned: Plan, answers: Sequence[tuple[str, str | None]], *, num_nodes: int) -> None:
    """Raise SpecError where a run cannot do with what nodes, by their addresses, answered: see `_looks`."""
    pipeline = planned.pipeline
    blind = [(address, why) for address, why in answers if why is not None]
    if not blind:
        return
    folder, addresses = pipeline.storage_folder, ", ".join(address for address, _ in blind)
    whose = f"storage: {len(blind)} of {num_nodes} nodes do not see this machine's {folder}: {addresses}"
    if pipeline.bucket_url is None:
        raise SpecError(
            f"{whose}. On several machines it must be on a disk that all of them share; "
            "or take storage: s3://BUCKET/PREFIX, by way of which files then go"
        )
    for node in planned.nodes:
        if node.status == "run" and not node.kind.works_apart(node.resources):
            raise SpecError(
                f"{whose}. What the processes of stage {node.stage!r} ({node.uses}) leave for each other does not go "
                "by way of the bucket: for that stage the folder must be on a disk that all of them share"
            )
    for address, why in blind:
        if why:
            raise SpecError(f"{whose}; and {address} cannot use the bucket instead: {why}")


def _asked(nodes: list[str], mark: Path, url: str | None) -> dict[str, str | None]:
    """What each node answers in time, by its id: see `_looks`."""
    looks = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        task = ray.remote(_looks).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
        looks[task.remote(mark, url)] = node
    answered, late = ray.wait(list(looks), num_returns=len(looks), timeout=ANSWER_S)
    for reference in late:
        ray.cancel(reference, force=True)
    answers = {}
    for reference in answered:
        with suppress(RayError):  # the node was lost meanwhile
            answers[looks[reference]] = ray.get(reference)
    return answers


def _looks(mark: Path, url: str | None) -> str | None:
    """None where the file is seen; else why the bucket cannot be used there, "" if it can be."""
    if mark.exists():
        return None
    try:
        if url is not None:
            try_bucket(url)
    except HeliostatError as error:
        return str(error)
    return ""
