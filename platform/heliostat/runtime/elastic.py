"""How many workers an elastic training has: as many as the nodes have room for, between its `min` and its `max`.

Ray Train has an elastic policy of its own. It sees the nodes as its autoscaling coordinator last did, up to 20 s ago,
so when a node was lost it starts the old number of workers and waits a minute for them; and to grow, it stops the
workers wherever they are. Here a training that lost workers waits until Ray knows which nodes are left, and one that
can grow ends after an epoch, with its checkpoint, and goes on with more workers from there.
"""

import socket
import time
from collections.abc import Callable, Mapping

import ray
from ray._private.state import available_resources_per_node

from heliostat.core.capacity import Capacity
from heliostat.core.spec import Resources

POLL_S = 0.5
ANSWER_S = 2.0
FORGET_S = 90.0
"""Longer than it takes Ray, by its defaults, to give up a machine that does not answer."""
FREE_S = 10.0
"""So long what the nodes have, but others still hold, is waited for."""
GROW_AFTER_S = 3.0
"""So long there must have been room before a training is interrupted to grow into it."""

Nodes = Mapping[str, Mapping[str, float]]
"""What each node has, by its id."""


def live_nodes() -> Nodes:
    """Those that Ray counts as alive."""
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def forget_lost_nodes() -> None:
    """Wait until Ray counts no node as alive that is gone, which it learns by asking each a few times."""
    until = time.monotonic() + FORGET_S
    while time.monotonic() < until and not all(_answers(node) for node in ray.nodes() if node["Alive"]):
        time.sleep(POLL_S)


def count_workers(resources: Resources, *, is_cancelled: Callable[[], bool]) -> int:
    """As many workers as there is room for, as soon as that is enough. Raises KeyboardInterrupt when cancelled.

    For what others hold beyond the `min` it waits only briefly.
    """
    started = time.monotonic()
    while not is_cancelled():
        nodes, most = live_nodes(), resources.most_workers
        at_best = min(most, Capacity.of(nodes.values()).workers(resources.per_worker))
        now = min(most, _free(nodes, resources))
        if now >= resources.workers and (now == at_best or time.monotonic() - started > FREE_S):
            return int(now)
        time.sleep(POLL_S)
    raise KeyboardInterrupt


def watch_for_room(resources: Resources, *, workers: int) -> Callable[[], bool]:
    """To be called by one of `workers` after each epoch: whether more could have joined them for a while."""
    since: float | None = None

    def has_room() -> bool:
        nonlocal since
        if workers == resources.most_workers or _free(live_nodes(), resources) < 1:
            since = None
            return False
        since = since or time.monotonic()
        return time.monotonic() - since >= GROW_AFTER_S

    return has_room


def _free(nodes: Nodes, resources: Resources) -> float:
    """How many workers find room beside all that holds something."""
    free = available_resources_per_node()
    return Capacity.of(free.get(name, {}) for name in nodes).workers(resources.per_worker)


def _answers(node: Mapping[str, object]) -> bool:
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), ANSWER_S).close()  # type: ignore[arg-type]
    except OSError:
        return False
    return True
