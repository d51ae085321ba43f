"""Delivery of what earlier processes left in a spool, for `heliostat sync`."""

from dataclasses import dataclass
from pathlib import Path

from heliostat.core.credentials import redacted
from heliostat.tracking.spool import left_behind, mark_delivered
from heliostat.tracking.writer import UnavailableError, absolute_uri, open_writer


@dataclass(frozen=True)
class Replayed:
    """Events delivered, events still waiting, and why those wait: one line per store that is away."""

    delivered: int
    waiting: int
    reasons: tuple[str, ...]


def replay(spool: Path, uri: str | None = None) -> Replayed:
    """Deliver what is in `spool` and belongs to no living process, to the stores it was meant for, or to `uri` only."""
    delivered = waiting = 0
    reasons: dict[str, str] = {}
    for journal in left_behind(spool):
        spooled = journal.undelivered()
        if uri is None or journal.target.uri == absolute_uri(uri):
            try:
                if spooled and journal.target.uri not in reasons:
                    writer = open_writer(journal.target)
                    writer.deliver([one.event for one in spooled])
                    writer.close()
                    mark_delivered(spooled)
                    delivered += len(spooled)
                    spooled = []
            except UnavailableError as error:
                reasons[journal.target.uri] = redacted(f"{journal.target.uri} is away: {error}")
        waiting += len(spooled)
        journal.release()
    return Replayed(delivered, waiting, tuple(reasons.values()))
