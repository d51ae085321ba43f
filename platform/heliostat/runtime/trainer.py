"""Training by several workers, through Ray Train: a `TorchTrainer` whose workers all run the one training loop.

Ray Train starts the workers and joins them in a process group (NCCL with GPUs, else gloo). It would run the user's
bad code again as well, so workers are started anew from here, after one died. It carries no data: rows reach the
driver through the mailbox, since each of Ray's own reports waits for a poll of its controller. Checkpoints lie in the
folder, or in one of its path on each machine, which the carrier then keeps as one. One worker runs in place, as a
task; an elastic training is always Ray Train's, with as many workers as there is room for each time that it starts or
goes on. What is made of the trained weights is made by the first worker, so that the driver needs no torch.
"""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayError

from heliostat.core.carrier import HERE, Carrier
from heliostat.core.disk import writing_to
from heliostat.core.imports import use_root
from heliostat.core.spec import Resources, Task
from heliostat.core.stage import Reporter
from heliostat.errors import HeliostatError, StageError
from heliostat.runtime.elastic import count_workers, forget_lost_nodes, live_nodes, watch_for_room
from heliostat.runtime.hang import NOTE, alive, ended_if_it_hangs, told_where_it_hung
from heliostat.runtime.mailbox import RemoteReporter, relay
from heliostat.runtime.shared_data import SharedData
from heliostat.runtime.tasks import own_traceback, run_task, use_threads, why_it_died
from heliostat.training.config import TrainConfig

if TYPE_CHECKING:
    from heliostat.training.progress import Fit, OnCheckpoint

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
    carrier: Carrier
    check_own: "OnCheckpoint | None" = None

    @property
    def hang_note(self) -> Path:
        return self.folder / NOTE


@dataclass(frozen=True)
class _CanGrow:
    """What an elastic training comes to that was interrupted after an epoch, since more workers can join."""


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
    carrier: Carrier = HERE,
    check_own: "OnCheckpoint | None" = None,
) -> Any:
    """Train with `resources.workers` workers; go on from the newest of `folder/checkpoints` if there are any.

    Gives what `finish`, called by the first worker in its own process, makes of the fit; without it, the fit. There
    `check_own` is given the first row and weights that a `task.train_fn` reports together.
    `retries` is how often the workers are started again after one died; for an elastic training, a node that was lost
    does not count. Raises StageError with the user's own traceback when the user's code raises, and KeyboardInterrupt
    when `cancel` is set.
    """
    with relay(reporter) as remote:
        work = TrainWork(task, config, resources, seed, root, folder, remote, finish, data, carrier, check_own)
        with told_where_it_hung(resources.hang_timeout_s, note=work.hang_note):
            if resources.most_workers > 1:
                return _train_together(work, retries=retries, cancel=cancel)
            alone = partial(run_task, root=root, held=resources.per_worker, retries=retries)
            return alone(_train_alone, work, cancel=cancel, warn=remote.warn)


def _train_alone(work: TrainWork) -> Any:
    return _run(work, rank=0, size=1)


def _run(work: TrainWork, *, rank: int, size: int) -> Any:
    if rank == 0:
        work.reporter.began()
    with writing_to(work.folder), work.carrier.following() if rank == 0 else nullcontext():
        return _train(work, rank=rank, size=size)


def _train(work: TrainWork, *, rank: int, size: int) -> Any:
    import torch

    from heliostat.training.checkpoints import Checkpoints
    from heliostat.training.isolation import fresh_process_state
    from heliostat.training.run import run_training
    from heliostat.training.seeding import seed_everything
    from heliostat.training.world import World

    fresh_process_state(num_threads=max(1, int(work.resources.cpus_per_worker)))
    seed_everything(work.seed)

    data = work.data.read(work.config.data_args) if work.data else None
    keep, warn = work.resources.keep_checkpoints, work.reporter.warn
    checkpoints = Checkpoints(work.folder / "checkpoints", keep=keep, warn=warn, carrier=work.carrier)
    has_room = watch_for_room(work.resources, workers=size)
    grows = False

    def on_epoch(epoch: int, metrics: Mapping[str, float]) -> bool:
        nonlocal grows
        alive()
        if rank != 0:
            return False
        elastic = {"workers": float(size)} if work.resources.is_elastic else {}
        work.reporter.metrics({**metrics, **elastic}, step=epoch)
        grows = bool(elastic) and has_room() and epoch < work.config.epochs and not checkpoints.is_empty()
        return grows or work.reporter.is_asked_to_stop()

    work.hang_note.unlink(missing_ok=True)
    with _watch(work, size=size):
        fitted = run_training(
            work.task,
            work.config,
            world=World(rank, size, torch.device(_device(work.resources))),
            seed=work.seed,
            on_epoch=on_epoch,
            checkpoints=checkpoints,
            data=data,
            check_own=work.check_own if rank == 0 else None,
        )
    if rank != 0:
        return None
    if grows:
        return _CanGrow()
    return work.finish(fitted) if work.finish else fitted


def _watch(work: TrainWork, *, size: int) -> AbstractContextManager[None]:
    """Several workers miss one that hangs; one alone is watched."""
    if size > 1:
        return nullcontext()
    return ended_if_it_hangs(work.resources.hang_timeout_s, note=work.hang_note)


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


class _NoRoomError(StageError):
    """What the workers of an elastic training were counted for was taken, or lost, before they had it."""


def _fit(work: TrainWork, retries: int) -> Any:
    resources, is_cancelled = work.resources, work.reporter.is_asked_to_stop
    while True:
        nodes = live_nodes().keys()
        num_workers = count_workers(resources, is_cancelled=is_cancelled) if resources.is_elastic else resources.workers
        try:
            outcome = _fit_once(work, num_workers)
        except _NoRoomError as error:
            work.reporter.warn(str(error))
            forget_lost_nodes()
        except _WorkersDiedError as error:
            if is_cancelled():
                raise
            if retries == 0 and not resources.is_elastic:
                raise
            forget_lost_nodes()
            if not (resources.is_elastic and nodes - live_nodes().keys()):
                if retries == 0:
                    raise
                retries -= 1
            what, _, _ = str(error).partition("\n")
            work.reporter.warn(f"{what}; training goes on from its last checkpoint")
        else:
            if not isinstance(outcome, _CanGrow):
                return outcome


def _fit_once(work: TrainWork, num_workers: int) -> Any:
    from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError

    from heliostat.runtime.ray_train import Trainer
    from heliostat.runtime.rendezvous import LocalTorchConfig

    resources = work.resources
    trainer = Trainer(
        _worker,
        train_loop_config={"work": work},
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=bool(resources.gpus_per_worker),
            resources_per_worker=resources.per_worker,
            placement_strategy=resources.placement.upper(),
        ),
        torch_config=LocalTorchConfig(
            backend="nccl" if resources.gpus_per_worker >= 1 else "gloo", timeout_s=resources.hang_timeout_s
        ),
        run_config=RunConfig(
            name="train",
            storage_path=str(work.folder / ".ray"),
            failure_config=FailureConfig(controller_failure_limit=0 if resources.is_elastic else -1),
        ),
    )
    try:
        return trainer.fit().return_value
    except WorkerGroupError as error:
        raise _the_cause(error.worker_failures) from None
    except ControllerError as error:
        failure = error.controller_failure
        if resources.is_elastic and isinstance(failure, WorkerGroupStartupTimeoutError):
            raise _NoRoomError(f"no room for {num_workers} workers any more") from None
        if resources.is_elastic and isinstance(failure, WorkerGroupStartupFailedError):
            raise _WorkersDiedError(f"{num_workers} workers did not start: {failure}") from None
        raise StageError(str(failure)) from error
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
