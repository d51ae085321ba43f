"""What of Ray Tune (2.60) is put right in this process, before its first search.

- A process that Ray killed for its memory is an `OutOfMemoryError`, which is no `RayActorError`. Tune knows only of the
  latter, and ends the whole search at the first of the former: "Caught unexpected exception". Here it becomes one.
- Tune counts its callbacks by kind, for statistics that are switched off, and imports MLflow for that.
"""

from typing import Any

from ray.air._internal import usage
from ray.air.execution._internal import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError


class ActorOutOfMemoryError(OutOfMemoryError, RayActorError):  # type: ignore[misc]
    """An actor died for want of memory."""

    def __init__(self, message: str) -> None:
        RayActorError.__init__(self, error_msg=message)
        OutOfMemoryError.__init__(self, message)


def mend_tune() -> None:
    """From now on Tune takes a trial's process that was killed for its memory for any dead one, and counts nothing."""
    RayActorManager._actor_task_failed = _as_dead_actor
    usage.tag_callbacks = _count_nothing


def _count_nothing(callbacks: Any) -> bool:
    return False


_told_of_failure = RayActorManager._actor_task_failed


def _as_dead_actor(self: RayActorManager, tracked_actor_task: Any, exception: Exception) -> None:
    if isinstance(exception, OutOfMemoryError):
        exception = ActorOutOfMemoryError(str(exception))
    _told_of_failure(self, tracked_actor_task, exception)
