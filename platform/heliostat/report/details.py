"""What `heliostat show` makes of a record's details: a table for each list of rows, and one for the single values.

A stage that puts a list of rows into its details has its table. What is nested deeper than a row's own values is left
to `--json`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from heliostat.report.text import candidates_table, table_of

Rows = Sequence[Mapping[str, Any]]


def detail_tables(details: Mapping[str, Any], *, width: int) -> Iterator[RenderableType]:
    """Tables for a terminal of `width` columns."""
    values = {name: _listed(value) for name, value in _flat(details).items() if not _is_nested(value)}
    if values:
        yield table_of(("details", ""), list(values.items()))
    for name, rows in details.items():
        if _is_rows(rows):
            yield TABLES[name](rows, width) if name in TABLES else _plain(name, rows)


def _plain(title: str, rows: Rows) -> RenderableType:
    flat = [_flat(row) for row in rows]
    nested = {name for row in flat for name, value in row.items() if _is_nested(value)}
    columns = [name for name in dict.fromkeys(name for row in flat for name in row) if name not in nested]
    table = table_of(columns, [[row.get(name) for name in columns] for row in flat])
    return Group(Text(f"  {TITLES.get(title, title)}", style="bold"), table)


def _candidates(rows: Rows, width: int) -> RenderableType:
    names = (name.removeprefix("val_") for name in rows[0]["metrics"] if name.startswith("val_"))
    return candidates_table(rows, next((name for name in names if name != "loss"), None), width=width)


TITLES = {
    "front": "front: the trials that no other is better than in every objective",
    "chains": "chains: by what their trials measured, those of the table above by what was measured in the end",
    "failures": "failures: how many trials failed in the same way, the first of them, and by what",
    "steps": "steps: what was done to the chosen model",
    "sensitivity": "sensitivity: what each layer alone costs, the others left as they are",
}
"""What is said above the rows of a detail, where its name does not say enough."""
TABLES: dict[str, Callable[[Rows, int], RenderableType]] = {"table": _candidates}
"""The details whose rows have a table of their own kind."""


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """With `{objective: {mode: max}}` as `{objective.mode: max}`; deeper mappings stay."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, Mapping) else {name: value}
    return flat


def _listed(value: Any) -> Any:
    """Texts, such as warnings, with a line for each; by name, such as the reason of each layer, behind the name."""
    if _is_named_texts(value):
        return "\n".join(f"{name}: {text}" for name, text in value.items())
    is_texts = isinstance(value, list) and all(isinstance(text, str) for text in value)
    return "\n".join(value) if is_texts else value


def _is_nested(value: Any) -> bool:
    return (isinstance(value, Mapping) and not _is_named_texts(value)) or _is_rows(value)


def _is_named_texts(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(text, str) for text in value.values())


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, Mapping) for row in value)
