"""The data that ranges of activations are read off: checked, whoever reads them."""

from collections.abc import Iterable

from torch import Tensor

from heliostat.errors import StageError


def checked(batches: Iterable[Tensor]) -> list[Tensor]:
    """The batches that have rows, on the CPU.

    Raises:
        StageError: there is no row; some are not finite, with their numbers.
    """
    found: list[Tensor] = []
    num_rows = 0
    for batch in batches:
        if not len(batch):
            continue
        if batch.is_floating_point() and not batch.isfinite().all():
            raise StageError(f"calibration: rows {num_rows} to {num_rows + len(batch) - 1} are not finite")
        num_rows += len(batch)
        found.append(batch.detach().cpu())
    if not found:
        raise StageError("calibration: there is no data")
    return found
