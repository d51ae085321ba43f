"""Workers of a training that are started before it begins, and import meanwhile what it takes.

Each is an actor that holds nothing, on a node where the training is expected to run: the placement group that Ray Train
makes when the training begins holds what its workers train with. Those that turn out to stand on the wrong node are
ended, and others started in their place. A worker with an accelerator is not started ahead: Ray hands it the device as
it starts; nor is one behind a `ray://` client, where Ray Train makes its own.
"""

import importlib
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.client import ray as client
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from heliostat.core.capacity import Capacity
from heliostat.core.spec import Resources

IMPORTS = ("torch", "ray.train.torch", "heliostat.runtime.trainer", "heliostat.training.run")

_lock = threading.Lock()
_waiting: dict[Path, list[tuple[str, ActorHandle]]] = {}
"""By the folder of their training, or of its stage: those that are not taken, each with the node it stands on."""


@ray.remote
class TrainWorker:
    """Ray Train's worker, which only the process it runs in has to import."""

    def __init__(self) -> None:
        for module in IMPORTS:
            importlib.import_module(module)
        from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker

        self._worker = RayTrainWorker()

    def get_metadata(self) -> Any:
        return self._worker.get_metadata()

    def execute(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        return self._worker.execute(function, *args, **kwargs)

    def init_train_context(self, **context: Any) -> None:
        self._worker.init_train_context(**context)

    def run_train_fn(self, function: Any) -> None:
        self._worker.run_train_fn(function)

    def poll_status(self) -> Any:
        return self._worker.poll_status()

    def mark_preempt(self, info: Any) -> None:
        self._worker.mark_preempt(info)

    def shutdown(self) -> None:
        self._worker.shutdown()


def call_up(folder: Path, resources: Resources) -> None:
    """Start the workers of the training in `folder`, or in one right below it, unless they stand by already."""
    if resources.most_workers == 1 or resources.gpus_per_worker or client.is_connected():
        return
    with _lock:
        if not _waiting.keys() & {folder, folder.parent}:
            _waiting[folder] = [(node, _on(node)) for node in expected_nodes(_nodes(), resources)]


def take(folder: Path, node: str) -> ActorHandle | None:
    """A worker of the training in `folder` that stands by on `node`; None where none does."""
    with _lock:
        for waiting in (_waiting.get(folder, []), _waiting.get(folder.parent, [])):
            for entry in waiting:
                if entry[0] == node:
                    waiting.remove(entry)
                    return entry[1]
    return None


def dismiss(folder: Path) -> None:
    """End those that the training in `folder` has not taken."""
    with _lock:
        for _, worker in [*_waiting.pop(folder, []), *_waiting.pop(folder.parent, [])]:
            ray.kill(worker)


def forget() -> None:
    """Of workers of a session that ends, which end with it."""
    with _lock:
        _waiting.clear()


def expected_nodes(nodes: Mapping[str, Mapping[str, float]], resources: Resources) -> list[str]:
    """The nodes on which a training will find its workers, one name for each; `nodes` is what each node has.

    As Ray places what is to be packed: on the smallest node that holds all, or else on the largest ones.
    """
    room = {name: int(Capacity.of([has]).workers(resources.per_worker)) for name, has in nodes.items()}
    most_first = sorted(room, key=lambda name: room[name], reverse=True)
    if resources.placement.startswith("spread"):
        turns = [name for turn in range(resources.most_workers) for name in most_first if turn < room[name]]
        return turns[: resources.most_workers]
    enough = [name for name in reversed(most_first) if room[name] >= resources.most_workers]
    filled = [name for name in enough[:1] or most_first for _ in range(room[name])]
    return filled[: resources.most_workers]


def _nodes() -> Mapping[str, Mapping[str, float]]:
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def _on(node: str) -> ActorHandle:
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    return TrainWorker.options(num_cpus=0, scheduling_strategy=strategy).remote()  # type: ignore[attr-defined]
