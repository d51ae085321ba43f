"""A Ray of this process's own, with the processes that serve it and no others.

Of its dashboard Ray starts a part even when told not to, and waits for that process, imports and all, before it starts
the next; and an autoscaler, though nothing can be added. Both are left out. The dashboard's agent, which no node can be
without, starts as it does where the packages of a dashboard are not installed: nobody asks this one for anything, and
the node waits for what it imports. On two busy cores a Ray is there in half of the time.

Its processes listen on 127.0.0.1 alone: anyone who reaches a Ray can run anything as its user.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from heliostat.runtime.auth import make_token_private


def joinable_here() -> set[str]:
    """The addresses of the Rays on this machine that other processes can join: not of those that runs have embedded.

    Ray takes a loopback address for one that stands for the machine's own, where an embedded Ray does not listen.
    """
    from ray._private.services import canonicalize_bootstrap_address, find_gcs_addresses

    return {address for address in find_gcs_addresses() if canonicalize_bootstrap_address(address) == address}


def start_embedded(*, temp: Path, logging_format: str, num_cpus: int | None = None) -> Any:
    """Start a Ray in `temp` and connect to it; what `ray.init` gives."""
    import ray

    make_token_private()
    cpus = {} if num_cpus is None else {"num_cpus": num_cpus}
    with _without_helpers():
        return ray.init(
            address="local", include_dashboard=False, logging_format=logging_format, _temp_dir=str(temp), **cpus
        )


@contextmanager
def _without_helpers() -> Iterator[None]:
    from ray._private import ray_constants, utils
    from ray._private.node import Node

    replaced = [  # of Ray 2.60
        (Node, "start_api_server", _start_nothing),
        (Node, "start_monitor", _start_nothing),
        (utils, "get_dashboard_dependency_error", _no_dashboard),
        (ray_constants, "ENABLE_RAY_CLUSTER", False),  # the node's address is 127.0.0.1, so all listen there alone
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
