"""The data of a search: built once, in one task, and mapped by every trial on a node from Ray's object store.

The driver starts the task before it hands out the first trial with given `data_args`, and leaves a reference to what
comes of it in the key-value store that every Ray cluster has, under a name that trials can work out. Each trial gets
datasets of its own over the shared memory. What cannot be pickled, each process builds for itself, once.
"""

import hashlib
import json
import logging
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import ObjectRef, cloudpickle
from ray.exceptions import RayError
from ray.experimental import internal_kv

from heliostat.core.spec import Task
from heliostat.core.stage import StageContext
from heliostat.errors import StageError
from heliostat.runtime.hang import NOTE, ended_if_it_hangs, waiting, why_it_hung
from heliostat.runtime.tasks import call_in_worker, why_it_died

if TYPE_CHECKING:
    from heliostat.training.task import Data

SHARED_AT_MOST = 8
"""So many different `data_args` of one search are shared: what a search draws anew for each trial fills no store."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SharedData:
    """Where trials look for the data."""

    box: str
    folder: Path
    """Where a process that hung left word of it."""
    hang_timeout_s: float

    def note(self, name: bytes) -> Path:
        return self.folder / f".{name.decode().rpartition('/')[2][:16]}{NOTE}"

    def name(self, data_args: Mapping[str, Any]) -> bytes:
        arguments = json.dumps(dict(data_args), sort_keys=True)
        return f"{self.box}/{hashlib.sha256(arguments.encode()).hexdigest()}".encode()

    def read(self, data_args: Mapping[str, Any]) -> "Data | None":
        """The datasets, which must not be changed in place; None where there are none that could travel.

        Raises what the user's function raised, and StageError when its process died.
        """
        name = self.name(data_args)
        try:
            with waiting():
                outcome, value = _fetch(name)
        except RayError as error:
            hung = why_it_hung(self.hang_timeout_s, note=self.note(name))
            raise StageError(f"task.data: {hung or why_it_died(error)}") from None
        if outcome == "raised":
            raise value
        if value is None:
            return None
        from heliostat.runtime.packing import unpack

        data: Data = unpack(value)
        return data


@lru_cache(maxsize=SHARED_AT_MOST)
def _fetch(name: bytes) -> tuple[str, Any]:
    reference = internal_kv._internal_kv_get(name)
    return ray.get(cloudpickle.loads(reference)) if reference else ("returned", None)


class DataProvider:
    """The driver's end. Ray keeps what is built until the run ends."""

    def __init__(self, task: Task, *, root: Path, seed: int, retries: int, folder: Path, hang_timeout_s: float) -> None:
        self.shared = SharedData(f"heliostat/data/{uuid.uuid4().hex}", folder, hang_timeout_s)
        self._task, self._root, self._seed, self._retries = task, root, seed, retries
        self._built: dict[bytes, ObjectRef] = {}

    def provide(self, data_args: Mapping[str, Any]) -> None:
        """Have the data built, unless it is already or there are too many kinds of it. Waits for nothing."""
        name = self.shared.name(data_args)
        if name in self._built or len(self._built) == SHARED_AT_MOST:
            return
        watched = (self.shared.hang_timeout_s, self.shared.note(name))
        call = cloudpickle.dumps((_build, (self._task, dict(data_args), self._seed, *watched)))
        # Without a CPU: those may all be held by trials that wait for the data.
        task = ray.remote(call_in_worker).options(num_cpus=0, max_retries=self._retries)
        self._built[name] = task.remote(call, self._root, 1)
        internal_kv._internal_kv_put(name, cloudpickle.dumps(self._built[name]))

    def forget(self) -> None:
        for name in self._built:
            internal_kv._internal_kv_del(name)


@contextmanager
def shared_data(context: StageContext, *, folder: Path) -> Iterator[DataProvider | None]:
    """A provider for the trials of a stage; None where the user's own loop reads its data. `folder` is theirs."""
    if context.task.train_fn is not None:
        yield None
        return
    provider = DataProvider(
        context.task,
        root=context.root,
        seed=context.seed,
        retries=context.retries,
        folder=folder,
        hang_timeout_s=context.resources.hang_timeout_s,
    )
    try:
        yield provider
    finally:
        provider.forget()


def _build(task: Task, data_args: Mapping[str, Any], seed: int, hang_timeout_s: float, note: Path) -> Any:
    from heliostat.runtime.packing import pack
    from heliostat.training.seeding import seed_everything
    from heliostat.training.task import build_data

    seed_everything(seed)
    with ended_if_it_hangs(hang_timeout_s, note=note):
        data = build_data(task, data_args)
    try:
        return pack(data)
    except Exception as error:  # the user's objects may refuse in any way; each process then builds its own
        log.info("%s cannot be shared: %s: %s", task.data, type(error).__name__, error)
        return None
