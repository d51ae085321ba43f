"""One function of many items, each in a Ray task of its own, started by a stage that is a Ray task itself.

What the items share is put into the object store once, and every task on a node maps the same memory. While the stage
waits it computes nothing, and Ray lets its CPUs go until it is woken: tasks get on even where stages hold every CPU.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray import ObjectRef, cloudpickle
from ray.exceptions import RayError

from heliostat.core.mapping import in_turn
from heliostat.errors import StageError
from heliostat.runtime.hang import waiting
from heliostat.runtime.tasks import DEATHS, attempt, run_task, why_it_died

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")

log = logging.getLogger(__name__)


def side_by_side(
    function: Callable[[S, T], R], shared: S, items: Sequence[T], *, root: Path, retries: int = 0
) -> list[R]:
    """`[function(shared, item) for item in items]`, each in a task of one CPU and one thread.

    A single item, what cannot be pickled, and all of them where there is no Ray, are computed in this process. What is
    shared must not be changed in place. `retries` is how often an item runs again after its process died. Raises what
    the function raised, as `run_task` does; the items that still run are then stopped.
    """
    if len(items) == 1 or not ray.is_initialized():
        return in_turn(function, shared, items)
    from heliostat.runtime.packing import pack

    try:
        packed = ray.put(pack((function, shared)))
    except Exception as error:  # the user's objects may refuse in any way
        log.info("computed one after another: %s: %s", type(error).__name__, error)
        return in_turn(function, shared, items)
    # Ray's own retries know no end for a process that runs out of memory.
    task = ray.remote(_call).options(num_cpus=1, max_retries=0)
    calls = [cloudpickle.dumps(item) for item in items]
    left = [retries] * len(items)
    running: dict[ObjectRef, int] = {task.remote(packed, call, root): index for index, call in enumerate(calls)}
    results: dict[int, R] = {}
    try:
        while running:
            with waiting():
                (done,), _ = ray.wait(list(running), num_returns=1)
            index = running.pop(done)
            try:
                outcome, value = ray.get(done)
            except RayError as error:
                if not (left[index] and isinstance(error, DEATHS)):
                    raise StageError(why_it_died(error)) from error
                left[index] -= 1
                running[task.remote(packed, calls[index], root)] = index
                continue
            if outcome == "raised":
                raise value
            results[index] = value
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
    return [results[index] for index in range(len(items))]


def alone(function: Callable[..., R], *args: Any, root: Path, retries: int = 0) -> R:
    """`function(*args)` in a task that holds every CPU of one node, for a measurement; here, where there is no Ray."""
    if not ray.is_initialized():
        return function(*args)
    return run_task(function, *args, root=root, retries=retries, exclusive=True)


def _call(packed: Any, item: bytes, root: Path) -> tuple[str, Any]:
    def call() -> Any:
        from heliostat.runtime.packing import unpack

        function, shared = unpack(packed)
        return function(shared, cloudpickle.loads(item))

    return attempt(call, root=root, threads=1)
