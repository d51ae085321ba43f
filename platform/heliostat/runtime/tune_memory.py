"""What Ray says of a process that it killed for its memory, as Tune can take it.

Such a process is an `OutOfMemoryError`, which is no `RayActorError`. Ray Tune (2.60) knows only of the latter, and ends
the whole search at the first of the former: "Caught unexpected exception". Here it becomes one.
"""

from typing import Any

from ray.air.execution._internal import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError


class ActorOutOfMemoryError(OutOfMemoryError, RayActorError):  # type: ignore[misc]
    """An actor died for want of memory."""

    def __init__(self, message: str) -> None:
        RayActorError.__init__(self, error_msg=message)
        OutOfMemoryError.__init__(self, message)


def survive_memory_kills() -> None:
    """From now on, in this process, Tune treats a trial's process that was killed for its memory like any dead one."""
    RayActorManager._actor_task_failed = _as_dead_actor


_told_of_failure = RayActorManager._actor_task_failed


def _as_dead_actor(self: RayActorManager, tracked_actor_task: Any, exception: Exception) -> None:
    if isinstance(exception, OutOfMemoryError):
        exception = ActorOutOfMemoryError(str(exception))
    _told_of_failure(self, tracked_actor_task, exception)
