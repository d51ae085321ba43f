"""Where an interrupted fit goes on, and what it leaves behind for that, under any strategy."""

import logging

from torch import Tensor

from heliostat.training.checkpoints import Checkpoints
from heliostat.training.progress import Progress, read_on_first_worker
from heliostat.training.strategies.parallel import Weights
from heliostat.training.trainee import Trainee
from heliostat.training.world import World

log = logging.getLogger(__name__)


def take_up(
    trainee: Trainee, checkpoints: Checkpoints | None, *, world: World
) -> tuple[Progress, Weights, dict[str, Tensor]]:
    """Put the trainee where the newest checkpoint left it: how far that is, and the best epoch's weights and loss."""
    if trainee.parallel.is_sharded:
        from heliostat.training.sharded import restore_parts

        parts = restore_parts(checkpoints, trainee, world=world) if checkpoints is not None else None
        if parts is None:
            return Progress(), Weights(), {}
        progress, weights, of_loss = Progress(**parts[0]), parts[1], dict[str, Tensor]()
    else:
        found = read_on_first_worker(checkpoints, world=world)
        if found is None:
            return Progress(), Weights(), {}
        saved, best = found
        trainee.load(best)
        weights, of_loss = trainee.keep_weights_that_count(), trainee.keep_loss_that_counts()
        trainee.load(saved)
        progress = Progress(**saved["progress"])
    log.info("training goes on after epoch %d", progress.epoch)
    return progress, weights, of_loss


def put_down(trainee: Trainee, progress: Progress, checkpoints: Checkpoints, *, is_best: bool, world: World) -> None:
    """Write a checkpoint. Every worker calls it."""
    if trainee.parallel.is_sharded:
        from heliostat.training.sharded import save_parts

        save_parts(checkpoints, trainee, vars(progress), epoch=progress.epoch, is_best=is_best, world=world)
    elif world.rank == 0:
        state = trainee.state() | {"progress": vars(progress)}
        checkpoints.save(state, epoch=progress.epoch, is_best=is_best)
