"""A Ray of this process's own, with the processes that serve it and no others.

Of its dashboard Ray starts a part even when told not to, and waits for that process, imports and all, before it starts
the next; and an autoscaler, though nothing can be added. Both are left out: on two busy cores a Ray is there in half of
the time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LEFT_OUT = ("start_api_server", "start_monitor")
"""What a head node of Ray 2.60 starts them with."""


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
    from ray._private.node import Node

    kept = {name: getattr(Node, name) for name in LEFT_OUT}
    for name in LEFT_OUT:
        setattr(Node, name, _start_nothing)
    try:
        yield
    finally:
        for name, start in kept.items():
            setattr(Node, name, start)


def _start_nothing(node: Any, **settings: Any) -> None:
    pass
