"""The one entry to training: from a task and a config to a fit, by our loop or the user's own."""

from collections.abc import Callable

from torch import nn

from heliostat.core.spec import Task
from heliostat.training.checkpoints import Checkpoints
from heliostat.training.config import TrainConfig
from heliostat.training.loop import fit
from heliostat.training.progress import Fit, OnBest, OnCheckpoint, OnEpoch
from heliostat.training.seeding import seed_everything
from heliostat.training.task import Data, build_data, build_model, build_objective
from heliostat.training.uncompiled import leave_compiler_unloaded
from heliostat.training.user_loop import run_user_loop
from heliostat.training.world import World


def run_training(
    task: Task,
    config: TrainConfig,
    *,
    world: World,
    seed: int,
    on_epoch: OnEpoch | None = None,
    checkpoints: Checkpoints | None = None,
    require_checkpoint: bool = True,
    data: Data | None = None,
    after_step: Callable[[nn.Module], None] | None = None,
    on_best: OnBest | None = None,
    check_own: OnCheckpoint | None = None,
) -> Fit:
    """Train the task's model on its data. `require_checkpoint` refuses an own loop that leaves no weights behind.

    `data` is what the task's function would return, where it is there already. `after_step` and `on_best` are our
    loop's; the user's own has nothing of the kind. `check_own` is of the user's own: see `run_user_loop`.
    """
    leave_compiler_unloaded()
    if task.train_fn is not None:
        return run_user_loop(
            task,
            config,
            world=world,
            seed=seed,
            on_epoch=on_epoch,
            checkpoints=checkpoints,
            require_checkpoint=require_checkpoint,
            check_own=check_own,
        )
    data = data or build_data(task, config.data_args)
    seed_everything(seed)
    model = build_model(task, config.model_args)
    return fit(
        model,
        data,
        config,
        objective=build_objective(task),
        seed=seed,
        world=world,
        on_epoch=on_epoch,
        checkpoints=checkpoints,
        after_step=after_step,
        on_best=on_best,
    )
