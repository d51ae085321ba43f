"""Ray Train without the processes that serve nothing here.

By default a training of two workers is eight processes, each of which imports Ray Train: beside the workers, a
controller, a barrier for `ray.train.report`, a manager of Ray Train's own datasets, and three that look after
placement groups, nodes about to leave and an autoscaler's requests. Here the controller, which is Ray Train's own, is
an object of the driver; reports, data and nodes are Heliostat's business; a placement group is itself what an
autoscaler hears of; and workers that stand by are taken (`runtime/standby.py`) before any is started.
"""

import asyncio
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import state as worker_group_state
from ray.train.v2._internal.execution.worker_group import worker_group
from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle
from ray.train.v2._internal.execution.worker_group.worker import Worker
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup
from ray.train.v2._internal.util import bundle_to_remote_args
from ray.util import placement_group_table
from ray.util.client import ray as client
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from heliostat.errors import StageError
from heliostat.runtime.placement import name_for
from heliostat.runtime.standby import TrainWorker, dismiss, take

SUPERFLUOUS = (PlacementGroupCleanerCallback, DatasetsCallback)


class Trainer(TorchTrainer):  # type: ignore[misc]
    """A `TorchTrainer` whose controller is an object of the driver; behind a `ray://` client it is an actor."""

    def _create_default_callbacks(self) -> list[Any]:
        every: list[Any] = super()._create_default_callbacks()
        return every if client.is_connected() else [one for one in every if not isinstance(one, SUPERFLUOUS)]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        if client.is_connected():
            return super()._initialize_and_run_controller(**parts)
        controller = _Controller(**{**parts, "scaling_policy": _AsAsked(self.scaling_config)})
        asyncio.run(controller.run())
        return controller.get_result()


class _AsAsked(FixedScalingPolicy):  # type: ignore[misc]
    """The number of workers that was asked for, and no word to an autoscaler."""

    def after_controller_start(self, train_run_context: Any) -> None: ...
    async def before_controller_shutdown(self) -> None: ...
    def _maybe_send_resource_request(self) -> None: ...


class _Workers(WorkerGroup):  # type: ignore[misc]
    """Workers that stood by, or else new ones, each in its bundle of the placement group."""

    def _create_placement_group(self, _: Any, context: Any) -> DefaultPlacementGroupHandle:
        group = placement_group(
            bundles=[context.resources_per_worker] * context.num_workers,
            strategy=context.placement_strategy,
            bundle_label_selector=context.label_selector,
            name=name_for(self._train_run_context.train_loop_config["work"].folder),
        )
        return DefaultPlacementGroupHandle(group)

    def _create_workers(
        self, num_workers: int, placement_group: PlacementGroup, resources_per_worker: dict[str, float], **_: Any
    ) -> list[Worker]:
        folder = self._train_run_context.train_loop_config["work"].folder
        nodes = placement_group_table(placement_group)["bundles_to_node_id"]
        actors = [
            take(folder, nodes[bundle])
            or TrainWorker.options(  # type: ignore[attr-defined]
                **bundle_to_remote_args(resources_per_worker),
                scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group, bundle),
            ).remote()
            for bundle in range(num_workers)
        ]
        dismiss(folder)
        try:
            found = ray.get([actor.get_metadata.remote() for actor in actors])
        except RayActorError as error:
            for actor in actors:
                ray.kill(actor)
            raise WorkerGroupStartupFailedError(f"a worker did not start: {error}") from error
        workers = [
            Worker(actor, metadata, resources_per_worker, placement_group_bundle_index=bundle)
            for bundle, (actor, metadata) in enumerate(zip(actors, found))
        ]
        ranked: list[Worker] = WorkerGroup._assign_worker_ranks(workers)
        return ranked

    def _init_train_context_on_workers(self, workers: list[Worker], sync_actor: Any, args: dict[str, Any]) -> None:
        ray.get(
            [
                worker.actor.init_train_context.remote(
                    train_run_context=self._train_run_context,
                    distributed_context=worker.distributed_context,
                    synchronization_actor=sync_actor,
                    storage_context=self._storage_context,
                    worker_callbacks=self._worker_callbacks_to_propagate,
                    controller_actor=None,
                    **{name: values[rank] for name, values in args.items()},
                )
                for rank, worker in enumerate(workers)
            ]
        )


class _Controller(TrainController):  # type: ignore[misc]
    """Ends with the session of Ray that it began in: a training that was interrupted is not waited for."""

    worker_group_cls = _Workers

    def __init__(self, **parts: Any) -> None:
        self._job = _current_job()
        super().__init__(**parts)

    async def _run_control_loop_iteration(self) -> None:
        if _current_job() != self._job:
            raise StageError("Ray ended while the training ran")
        await super()._run_control_loop_iteration()


def _current_job() -> str | None:
    return ray.get_runtime_context().get_job_id() if ray.is_initialized() else None


class _NoBarrier:
    """In place of the actor at which `ray.train.report` waits for the other workers: Heliostat's reports do not."""

    @classmethod
    def options(cls, **_: Any) -> type["_NoBarrier"]:
        return cls

    @classmethod
    def remote(cls, **_: Any) -> type["_NoBarrier"]:
        return cls


worker_group.SynchronizationActor = _NoBarrier
worker_group_state._shutdown_sync_actor = lambda barrier: None
