"""What of Ray Tune (2.60) is put right in this process, before its first search.

- A process that Ray killed for its memory is an `OutOfMemoryError`, which is no `RayActorError`. Tune knows only of the
  latter, and ends the whole search at the first of the former: "Caught unexpected exception". Here it becomes one.
- Tune counts its callbacks by kind, for statistics that are switched off, and imports MLflow for that.
- Tune gives its actors a runtime environment of their own, of variables that the session's processes have already. Ray
  takes no process for them that it has started before, has another one prepare the environment, and starts Ray twice in
  each. Here they are in the session's environment, as all other processes are.
"""

from typing import Any

import ray
from ray.air._internal import usage
from ray.air.execution._internal import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.tune.execution.class_cache import _ActorClassCache


class ActorOutOfMemoryError(OutOfMemoryError, RayActorError):  # type: ignore[misc]
    """An actor died for want of memory."""

    def __init__(self, message: str) -> None:
        RayActorError.__init__(self, error_msg=message)
        OutOfMemoryError.__init__(self, message)


def mend_tune() -> None:
    """From now on Tune takes a trial's process that was killed for its memory for any dead one, counts nothing, and
    starts trials in the session's environment."""
    RayActorManager._actor_task_failed = _as_dead_actor
    usage.tag_callbacks = _count_nothing
    _ActorClassCache.get = _in_the_sessions_environment


def _count_nothing(callbacks: Any) -> bool:
    return False


def _in_the_sessions_environment(self: _ActorClassCache, trainable: type) -> Any:
    if trainable not in self._cache:
        self._cache[trainable] = ray.remote(trainable)
    return self._cache[trainable]


_told_of_failure = RayActorManager._actor_task_failed


def _as_dead_actor(self: RayActorManager, tracked_actor_task: Any, exception: Exception) -> None:
    if isinstance(exception, OutOfMemoryError):
        exception = ActorOutOfMemoryError(str(exception))
    _told_of_failure(self, tracked_actor_task, exception)
