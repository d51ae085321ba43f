"""`trials.json`: every trial of a search, as part of what the search made."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from heliostat.core.artifact import write_json

if TYPE_CHECKING:
    from heliostat.runtime.journal import TrialRecord


def write_trials(folder: Path, trials: "Sequence[TrialRecord]") -> None:
    """Write them in the order in which they were suggested."""
    write_json(
        folder / "trials.json",
        [
            {
                "id": t.id,
                "params": t.params,
                "status": t.status,
                "metrics": t.metrics,
                "epochs": t.epochs,
                "reason": t.reason,
                "seconds": t.seconds,
                "verdicts": [{name: what for name, what in vars(v).items() if name != "id"} for v in t.verdicts],
            }
            for t in trials
        ],
    )
