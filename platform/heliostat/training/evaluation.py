"""Quality over a whole split, exact for any number of workers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from heliostat.errors import StageError
from heliostat.training.batches import evaluation_counts, evaluation_shares, load_batches
from heliostat.training.config import CPU_ROWS
from heliostat.training.losses import summed
from heliostat.training.task import Objective
from heliostat.training.world import World, gather_rows, sum_over_workers


@torch.no_grad()  # not inference_mode: a tensor that a model caches here could not be trained with afterwards
def evaluate(
    model: Callable[[Tensor], Tensor],
    dataset: Dataset[Any],
    objective: Objective,
    *,
    split: str,
    batch_size: int = CPU_ROWS,
    world: World | None = None,
) -> dict[str, float]:
    """`{split}_loss` and every `{split}_{metric}` over the whole split exactly. A loss is as in `losses.py`.

    Each worker computes some of the batches, which are the same for any number of workers; outputs and targets are
    gathered in their order for the metrics, so every worker returns the same figures. The model may be any function of
    a batch; a module is put into evaluation mode. Raises StageError where nothing has a weight in the loss.
    """
    world = world or World()
    if isinstance(model, nn.Module):
        model.eval()
    if isinstance(objective.loss, nn.Module):
        objective.loss.eval()
    num_samples = len(dataset)  # type: ignore[arg-type]
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    outputs, targets = [], []
    for share, batch in load_batches(
        dataset, evaluation_shares(num_samples, batch_size=batch_size, world=world), device=world.device
    ):
        output = model(batch[0])
        if share.num_samples:
            sums += torch.stack(summed(objective.part_of_loss(output, batch[1]), share.num_samples))
        if objective.metrics:
            outputs.append(output[: share.num_samples].cpu())
            targets.append(batch[1][: share.num_samples].cpu())

    total, weight = sum_over_workers(sums, world=world).tolist()
    if not weight:
        raise StageError(f"the loss of every {split} sample has the weight 0; all its targets may be ignored")
    row = {f"{split}_loss": total / weight}
    if objective.metrics:
        counts = evaluation_counts(num_samples, batch_size=batch_size, num_workers=world.size)
        all_outputs = gather_rows(torch.cat(outputs), counts, world=world)
        all_targets = gather_rows(torch.cat(targets), counts, world=world)
        del outputs, targets
        row |= {f"{split}_{m.name}": m.value(all_outputs, all_targets, split=split) for m in objective.metrics}
    return row
