"""How figures and tables look on a terminal."""

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from heliostat.core.commands import with_store
from heliostat.core.tracking_uri import SQLITE

if TYPE_CHECKING:
    from heliostat.core.outcome import RunResult
    from heliostat.runtime.one_trial import Rerun

ROOM_FOR_REASONS = 120
"""So many columns besides the models' names, and a table of candidates has room for the reasons beside the figures."""


def duration(seconds: float) -> str:
    """`0.4 s`, `38 s`, `4 min 10 s`, `2 h 05 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def figure(value: Any) -> str:
    """A number with four significant digits; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 1000):
        return f"{int(value):,}"
    return f"{value:.4g}"


def candidates_table(rows: Sequence[Mapping[str, Any]], metric: str | None, *, width: int) -> Group:
    """What `select` saw: one row a model, and why it was or was not chosen.

    `metric` is a task metric such as `accuracy`. Where `width` has no room for the reasons, they stand below; where it
    has none for a model's name, the name goes over several lines. Figures are never cut.
    """
    quality = metric or "loss"
    table = Table(
        title="candidates, the uncompressed baseline first", title_justify="left", title_style="bold", box=SIMPLE_HEAD
    )
    beside = width >= ROOM_FOR_REASONS + max((len(row["model"]) for row in rows), default=0)
    table.add_column("model", overflow="fold")
    for heading in (f"val {quality}", f"test {quality}", "MB", "params", "p50 ms", "speed-up", "size"):
        table.add_column(heading if beside else heading.replace(" ", "\n"), justify="right", no_wrap=True)
    if beside:
        table.add_column("why", overflow="fold")
    for row in rows:
        metrics = row["metrics"]
        cells = [
            row["model"],
            *(figure(metrics.get(f"{split}_{quality}", "")) for split in ("val", "test")),
            f"{metrics['size_mb']:.3f}",
            figure(int(metrics["num_params"])),
            f"{metrics['latency_ms']:.3f}",
            f"{row['speed_up']:.1f}x",
            f"{row['size_ratio']:.3f}",
            *([row["why"]] if beside else []),
        ]
        table.add_row(*map(Text, cells), style="bold green" if row["chosen"] else None)
    reasons = [] if beside else [Text(f"  {row['model']}: {row['why']}") for row in rows]
    return Group(table, *reasons)


def next_step(result: "RunResult") -> str:
    """Where a finished run is reviewed."""
    store = result.nodes[0].path.parents[2]
    uri = result.tracking["uri"] or ""
    if uri.startswith("http"):
        return f"open {uri} and review the experiment {result.tracking['experiment']!r}"
    if uri != f"{SQLITE}{store / 'mlflow.db'}":
        return shlex.join(["mlflow", "ui", "--backend-store-uri", uri])
    return with_store("ui", store)


def table_of(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """A plain table of figures and words."""
    table = Table(box=SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(Text(figure(cell)) if cell is not None else "" for cell in row))
    return table


def rerun_table(rerun: "Rerun") -> Group:
    """A trial then and now: how it ended, its best epoch's figures, and what that amounts to."""
    then, now = rerun.then, rerun.now
    rows = [("status", then.status, now.status, ""), ("epochs", then.epochs, now.epochs, now.epochs - then.epochs)]
    verdict = "identical in every metric of every epoch" if rerun.identical else "not the same as then"
    failures = [f"{when}: {trial.reason}" for when, trial in (("then", then), ("now", now)) if trial.reason]
    return Group(
        Text(f"{rerun.node}, trial {then.id}: {verdict}", style="bold"),
        *(Text(f"changed since: {change}") for change in rerun.changed),
        table_of(("", "then", "now", "difference"), [*rows, *rerun.differences]),
        *map(Text, failures),
    )
