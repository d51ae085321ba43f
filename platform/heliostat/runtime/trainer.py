"""Training by several workers, through Ray Train: a `TorchTrainer` whose workers all run the one training loop.

Ray Train starts the workers and joins them in a process group (NCCL with GPUs, else gloo). It would run the user's bad
code again as well, so workers are started anew from here, after one died. It carries no data: rows reach the driver
through the mailbox, since each of Ray's own reports waits for a poll of its controller. Checkpoints lie in the folder,
which all workers must see. One worker runs in place, as a task. What is made of the trained weights is made by the
first worker, so that the driver needs no torch.
"""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayError

from heliostat.core.imports import use_root
from heliostat.core.spec import Resources, Task
from heliostat.core.stage import Reporter
from heliostat.errors import HeliostatError, StageError
from heliostat.runtime.mailbox import RemoteReporter, relay
from heliostat.runtime.shared_data import SharedData
from heliostat.runtime.tasks import own_traceback, run_task, use_threads, why_it_died
from heliostat.training.config import TrainConfig

if TYPE_CHECKING:
    from heliostat.training.progress import Fit

POLL_S = 0.1


@dataclass(frozen=True)
class TrainWork:
    """What every worker of a training is given."""

    task: Task
    config: TrainConfig
    resources: Resources
    seed: int
    root: Path
    folder: Path
    reporter: RemoteReporter
    finish: "Callable[[Fit], Any] | None"
    data: SharedData | None


def train_workers(
    task: Task,
    config: TrainConfig,
    *,
    resources: Resources,
    seed: int,
    root: Path,
    folder: Path,
    reporter: Reporter,
    cancel: threading.Event,
    retries: int = 0,
    finish: "Callable[[Fit], Any] | None" = None,
    data: SharedData | None = None,
) -> Any:
    """Train with `resources.workers` workers; go on from the newest of `folder/checkpoints` if there are any.

    Gives what `finish`, called by the first worker in its own process, makes of the fit; without it, the fit.
    `retries` is how often the workers are started again after one died. Raises StageError with the user's own traceback
    when the user's code raises, and KeyboardInterrupt when `cancel` is set.
    """
    with relay(reporter) as remote:
        work = TrainWork(task, config, resources, seed, root, folder, remote, finish, data)
        if resources.workers == 1:
            return run_task(_train_alone, work, root=root, held=resources.per_worker, retries=retries, cancel=cancel)
        return _train_together(work, retries=retries, cancel=cancel)


def _train_alone(work: TrainWork) -> Any:
    return _run(work, rank=0, size=1)


def _run(work: TrainWork, *, rank: int, size: int) -> Any:
    import torch

    from heliostat.training.checkpoints import Checkpoints
    from heliostat.training.isolation import fresh_process_state
    from heliostat.training.run import run_training
    from heliostat.training.seeding import seed_everything
    from heliostat.training.world import World

    fresh_process_state(num_threads=max(1, int(work.resources.cpus_per_worker)))
    seed_everything(work.seed)

    def on_epoch(epoch: int, metrics: Mapping[str, float]) -> bool:
        if rank != 0:
            return False
        work.reporter.metrics(metrics, step=epoch)
        return work.reporter.is_asked_to_stop()

    data = work.data.read(work.config.data_args) if work.data else None
    fitted = run_training(
        work.task,
        work.config,
        world=World(rank, size, torch.device(_device(work.resources))),
        seed=work.seed,
        on_epoch=on_epoch,
        checkpoints=Checkpoints(work.folder / "checkpoints", keep=work.resources.keep_checkpoints),
        data=data,
    )
    if rank != 0:
        return None
    return work.finish(fitted) if work.finish else fitted


def _device(resources: Resources) -> str:
    return "cuda" if resources.gpus_per_worker else "cpu"


def _train_together(work: TrainWork, *, retries: int, cancel: threading.Event) -> Any:
    fitting: Future[Any] = Future()
    threading.Thread(target=_resolve, args=(fitting, work, retries), name="train", daemon=True).start()
    try:
        while not wait([fitting], timeout=POLL_S).done:
            if cancel.is_set():
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        work.reporter.ask_to_stop()  # the workers end at their next epoch; nobody waits for them
        raise
    return fitting.result()


def _resolve(future: "Future[Any]", work: TrainWork, retries: int) -> None:
    """In a thread, where Ray Train leaves the signal handlers alone."""
    try:
        future.set_result(_fit(work, retries))
    except BaseException as error:
        future.set_exception(error)


class _WorkersDiedError(StageError):
    """A process of the training was lost."""


def _fit(work: TrainWork, retries: int) -> Any:
    for _ in range(retries):
        try:
            return _fit_once(work)
        except _WorkersDiedError:
            if work.reporter.is_asked_to_stop():
                raise
    return _fit_once(work)


def _fit_once(work: TrainWork) -> Any:
    from ray.train import ControllerError, RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    class Trainer(TorchTrainer):  # type: ignore[misc]
        """Without the process that outlives a crashed driver to free its workers: ours end with the driver."""

        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]

    resources = work.resources
    trainer = Trainer(
        _worker,
        train_loop_config={"work": work},
        scaling_config=ScalingConfig(
            num_workers=resources.workers,
            use_gpu=bool(resources.gpus_per_worker),
            resources_per_worker=resources.per_worker,
            placement_strategy=resources.placement.upper(),
        ),
        torch_config=TorchConfig(
            backend="nccl" if resources.gpus_per_worker >= 1 else "gloo", timeout_s=resources.hang_timeout_s
        ),
        run_config=RunConfig(name="train", storage_path=str(work.folder / ".ray")),
    )
    try:
        return trainer.fit().return_value
    except WorkerGroupError as error:
        raise _the_cause(error.worker_failures) from None
    except ControllerError as error:
        raise StageError(str(error.controller_failure)) from error
    except RayError as error:
        raise _WorkersDiedError(f"Ray Train's controller: {why_it_died(error)}") from error


def _worker(config: dict[str, Any]) -> Any:
    from ray import train

    work: TrainWork = config["work"]
    context = train.get_context()
    use_root(work.root)
    use_threads(max(1, int(work.resources.cpus_per_worker)))
    try:
        return _run(work, rank=context.get_world_rank(), size=context.get_world_size())
    except HeliostatError:
        raise
    except Exception as error:
        raise StageError(own_traceback(error)) from None


def _the_cause(failures: Mapping[int, Exception]) -> HeliostatError:
    """One worker's failure as an error of ours. When one dies, its peers lose their connections: that is no cause."""
    rank, failure = min(failures.items(), key=lambda item: (_lost_a_peer(item[1]), item[0]))
    # What the worker raised, or what became of its process; anything else is trouble of Ray Train itself.
    inner = getattr(failure, "_base_exc", None) or getattr(failure, "health_check_failure", None) or failure
    if isinstance(inner, RayError):
        return _WorkersDiedError(f"worker {rank}: {why_it_died(inner)}")
    if _lost_a_peer(failure):
        return _WorkersDiedError(f"worker {rank} lost a peer: {inner}")
    return inner if isinstance(inner, HeliostatError) else StageError(f"worker {rank}: {inner}")


def _lost_a_peer(failure: Exception) -> bool:
    """Whether it is gloo's word for it: `Connection closed by peer`, or `reset`, or that a peer did not answer."""
    return "by peer" in str(failure) or "Timed out waiting" in str(failure)
