"""One function in one Ray worker, waited for.

Workers are kept and used again, so a module that one task imported is there for the next. What the function raises
comes back as it was when it is one of ours, and as a StageError with the function's own traceback when it is not.
"""

import os
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray import cloudpickle
from ray._private.state import available_resources_per_node
from ray.exceptions import (
    ActorDiedError,
    NodeDiedError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from heliostat.core.imports import use_root
from heliostat.errors import HeliostatError, StageError
from heliostat.runtime.hang import waiting

R = TypeVar("R")
POLL_S = 0.2
ONE_CPU: Mapping[str, float] = {"CPU": 1}
DEATHS = (WorkerCrashedError, NodeDiedError, OutOfMemoryError)
"""Of the process of a task, which may then be started again."""


def _unheard(text: str) -> None: ...


def run_task(
    function: Callable[..., R],
    *args: Any,
    root: Path,
    held: Mapping[str, float] = ONE_CPU,
    retries: int = 0,
    exclusive: bool = False,
    cancel: threading.Event | None = None,
    warn: Callable[[str], None] = _unheard,
) -> R:
    """`function(*args)` in a worker that has `held` of its node to itself, and as many threads as CPUs.

    `retries` is how often it runs again after its process died, of which `warn` is told; an exception is never retried.
    `exclusive` holds every CPU of one node, an idle one if there is one, so that nothing else disturbs a measurement;
    the threads are still those of `held`. Raises KeyboardInterrupt when `cancel` is set, StageError when the function
    raises or its process dies.
    """
    options: dict[str, Any] = {
        "num_cpus": held["CPU"],
        "num_gpus": held.get("GPU", 0),
        "resources": {name: count for name, count in held.items() if name not in ("CPU", "GPU")},
    }
    if exclusive:
        free = available_resources_per_node()
        nodes = [node for node in ray.nodes() if node["Alive"]]
        node = max(nodes, key=lambda n: (_is_idle(n, free), n["Resources"].get("CPU", 0)))
        options |= {
            "num_cpus": node["Resources"].get("CPU", 0),
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        }
    threads = max(1, int(held["CPU"]))
    # Ray's own retries know no end for a process that runs out of memory.
    task = ray.remote(call_in_worker).options(**options, max_retries=0)
    call = cloudpickle.dumps((function, args))
    for left in reversed(range(retries + 1)):
        reference = task.remote(call, root, threads)
        try:
            outcome, value = _wait_for(reference, cancel)
            break
        except KeyboardInterrupt:
            ray.cancel(reference, force=True)
            raise
        except RayError as error:
            if not (left and isinstance(error, DEATHS)):
                raise StageError(why_it_died(error)) from error
            warn(f"{why_it_died(error)}; it is started again")
    if outcome == "raised":
        raise value
    result: R = value
    return result


def _wait_for(reference: ray.ObjectRef, cancel: threading.Event | None) -> tuple[str, Any]:
    with waiting():
        while not ray.wait([reference], timeout=POLL_S)[0]:
            if cancel is not None and cancel.is_set():
                raise KeyboardInterrupt
    result: tuple[str, Any] = ray.get(reference)
    return result


def has_idle_node() -> bool:
    """Whether, of several nodes of the cluster, one has nothing to do. On a single node the answer is always no."""
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    free = available_resources_per_node()
    return len(nodes) > 1 and any(_is_idle(node, free) for node in nodes)


def _is_idle(node: Mapping[str, Any], free: Mapping[str, Mapping[str, float]]) -> bool:
    return bool(free.get(node["NodeID"], {}).get("CPU", 0) == node["Resources"].get("CPU", 0))


def call_in_worker(call: bytes, root: Path, threads: int) -> tuple[str, Any]:
    """What `attempt` makes of a call, which comes pickled: its function may be in a module of `root`."""

    def function() -> Any:
        function, args = cloudpickle.loads(call)
        return function(*args)

    return attempt(function, root=root, threads=threads)


def attempt(function: Callable[[], Any], *, root: Path, threads: int) -> tuple[str, Any]:
    """The function's result, or its error as a value: Ray would wrap a raised one in text of its own."""
    use_root(root)
    use_threads(threads)
    try:
        return "returned", function()
    except HeliostatError as error:
        return "raised", error
    except Exception as error:
        return "raised", StageError(own_traceback(error))


def use_threads(count: int) -> None:
    """Let what computes in this process use `count` threads."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(count)
    import torch

    torch.set_num_threads(count)


def own_traceback(error: BaseException) -> str:
    """The error in one line, then its traceback without the frames of this package's own plumbing."""
    frames = traceback.extract_tb(error.__traceback__)
    package = str(Path(__file__).parent)
    kept = [frame for frame in frames if not frame.filename.startswith(package)]
    first = "".join(traceback.format_exception_only(error)).strip()
    return f"{first}\n{''.join(traceback.format_list(kept))}".rstrip()


def why_it_died(error: RayError) -> str:
    """What became of a process that Ray lost, in a sentence."""
    match error:
        case OutOfMemoryError():
            return f"killed because the machine ran out of memory: {_first_line(error)}"
        case WorkerCrashedError() | NodeDiedError() | ActorDiedError():
            return "its process was killed or crashed"
        case TaskCancelledError():
            return "cancelled"
        case RayTaskError():
            return str(error).strip()
        case _:
            return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
