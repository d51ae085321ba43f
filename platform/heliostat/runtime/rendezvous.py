"""How the workers of a training on an embedded Ray find each other: on this machine's loopback interface alone.

`torch.distributed` by itself serves its key-value store on every interface of the first worker's machine, and gloo and
NCCL listen on the one that the host's name or its routes lead to. On one machine nothing but loopback is needed: the
first worker binds the store's socket there, and the environment tells the libraries the interface. On a cluster Ray
Train's own way is taken.
"""

import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import torch.distributed as dist
from ray.train.torch.config import TorchConfig, _set_torch_distributed_env_vars, _TorchBackend

LOOPBACK = "127.0.0.1"
INTERFACE = "lo0" if sys.platform == "darwin" else "lo"

_bound: list[socket.socket] = []
"""In the first worker, from when it has told its port until the process group is there."""


@dataclass
class LocalTorchConfig(TorchConfig):  # type: ignore[misc]
    """A `TorchConfig` whose process group stays on loopback where the whole Ray does."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _LocalBackend if ray.util.get_node_ip_address() == LOOPBACK else _TorchBackend


class _LocalBackend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        port = worker_group.execute_single(0, _bind)
        found = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(port)}
        kept = {"GLOO_SOCKET_IFNAME": INTERFACE, "NCCL_SOCKET_IFNAME": INTERFACE}
        worker_group.execute(_set_environment, found | kept)
        worker_group.execute(_set_torch_distributed_env_vars)
        given = {"size": len(worker_group), "backend": backend_config.backend, "timeout_s": backend_config.timeout_s}
        ray.get([worker_group.execute_single_async(rank, _join, rank, port, **given) for rank in range(given["size"])])


def _set_environment(variables: Mapping[str, str]) -> None:
    os.environ.update(variables)


def _bind() -> int:
    """Listen on loopback, at a port that is free."""
    listener = socket.create_server((LOOPBACK, 0))
    _bound[:] = [listener]
    port: int = listener.getsockname()[1]
    return port


def _join(rank: int, port: int, *, size: int, backend: str, timeout_s: int) -> None:
    """Make this process a member of the process group whose store the first worker serves at `port`."""
    timeout = timedelta(seconds=timeout_s)
    served: Mapping[str, Any] = {"master_listen_fd": _bound.pop().detach()} if rank == 0 else {}
    store = dist.TCPStore(  # type: ignore[attr-defined]
        LOOPBACK, port, size, is_master=rank == 0, timeout=timeout, **served
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
