"""What is tracked, as data: one event is one line of JSON, and carries the time at which it happened.

`cleaned` brings an event into the form that every MLflow store accepts: plain numbers and texts, allowed names, and
values no longer than the limits of `mlflow.utils.validation`, which one of the writers here does not pass through.
"""

import base64
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Kind = Literal["start", "metrics", "params", "tags", "artifact", "text", "model", "end", "end_tree"]
Status = Literal["FINISHED", "FAILED", "KILLED"]

KEY_TAG = "heliostat.key"
MODEL_TAG = "heliostat.model_uri"
PARENT_TAG = "mlflow.parentRunId"
NOTE_TAG = "mlflow.note.content"
"""The description, in Markdown, at the top of a run's page."""
ERROR_TAG = "heliostat.error"
ERROR_FILE = "error.txt"
"""With the tag, what a run failed by: gone as soon as it goes on."""
FAILED_NOTE = "**Failed.**"
"""How the description of a run that failed begins; that goes too."""

MAX_NAME_CHARS = 250
MAX_PARAM_CHARS = 6000
MAX_TAG_CHARS = 8000
CUT = " … (cut)"

_NOT_IN_A_NAME = re.compile(r"[^\w\-. :/]")


@dataclass(frozen=True)
class Event:
    """Something that happened to the run of `key`, `time_ms` milliseconds after the epoch."""

    kind: Kind
    key: str
    time_ms: int
    data: Mapping[str, Any]


def to_json(event: Event) -> str:
    return json.dumps(vars(event), ensure_ascii=False, separators=(",", ":"))


def from_json(line: str) -> Event:
    return Event(**json.loads(line))


def cleaned(event: Event) -> Event:
    """The event as MLflow takes it. Raises TypeError or ValueError for a metric that is no number."""
    data = dict(event.data)
    match event.kind:
        case "start":
            data["name"] = cut(data["name"], MAX_NAME_CHARS)
            data["tags"] = _tags(data["tags"])
            data["params"] = _params(data["params"])
        case "metrics":
            data["values"] = {allowed_name(k): float(v) for k, v in data["values"].items()}
        case "params":
            data["values"] = _params(data["values"])
        case "tags":
            data["values"] = _tags(data["values"])
        case "model":
            data |= {name: _array_to_text(data[name]) for name in ("example", "outputs")}
        case "artifact" | "text" | "end" | "end_tree":
            pass
    return replace(event, data=data)


def allowed_name(name: str) -> str:
    """`name` with every character that MLflow refuses in the name of a metric, parameter or tag replaced by `_`."""
    return _NOT_IN_A_NAME.sub("_", name)[:MAX_NAME_CHARS]


def cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - len(CUT)] + CUT


def _tags(tags: Mapping[str, Any]) -> dict[str, str]:
    return {allowed_name(k): cut(_as_text(v), MAX_TAG_CHARS) for k, v in tags.items()}


def _params(params: Mapping[str, Any]) -> dict[str, str]:
    return {allowed_name(k): cut(_as_text(v), MAX_PARAM_CHARS) for k, v in _flat(params)}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted names, `optimizer.lr`, as a search space writes them: MLflow compares runs by name."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _as_text(value: Any) -> str:
    return json.dumps(value, default=str) if isinstance(value, dict | list | tuple) else str(value)


def _array_to_text(array: Any) -> str:
    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
