"""A Ray of this process's own, with the processes that serve it and no others.

Of its dashboard Ray starts a part even when told not to, and waits for that process, imports and all, before it starts
the next; and an autoscaler, though nothing can be added. Both are left out. The dashboard's agent, which no node can be
without, starts as it does where the packages of a dashboard are not installed: nobody asks this one for anything, and
the node waits for what it imports. On two busy cores a Ray is there in half of the time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def start_embedded(*, temp: Path, logging_format: str, num_cpus: int | None = None) -> Any:
    """Start a Ray in `temp` and connect to it; what `ray.init` gives."""
    import ray

    cpus = {} if num_cpus is None else {"num_cpus": num_cpus}
    with _without_helpers():
        return ray.init(
            address="local", include_dashboard=False, logging_format=logging_format, _temp_dir=str(temp), **cpus
        )


@contextmanager
def _without_helpers() -> Iterator[None]:
    from ray._private import utils
    from ray._private.node import Node

    replaced = [  # of Ray 2.60
        (Node, "start_api_server", _start_nothing),
        (Node, "start_monitor", _start_nothing),
        (utils, "get_dashboard_dependency_error", _no_dashboard),
    ]
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for owner, name, instead in replaced:
        setattr(owner, name, instead)
    try:
        yield
    finally:
        for owner, name, before in kept:
            setattr(owner, name, before)


def _start_nothing(node: Any, **settings: Any) -> None:
    pass


def _no_dashboard() -> ImportError:
    return ImportError("an embedded Ray has no dashboard")
