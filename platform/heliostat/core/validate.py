"""From a plain mapping to a frozen object, with errors that name the place, the value and the nearest right word."""

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from heliostat.core.credentials import redacted
from heliostat.errors import SpecError, nearest

T = TypeVar("T", bound=BaseModel)


def validate(model: type[T], data: Any, place: str = "") -> T:
    """An instance of `model` from `data`. Raises SpecError with one line per fault."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        faults = [fault for fault in error.errors(include_url=False) if not _follows_from_another(fault)]
        lines = (_describe(model, data, place, fault) for fault in faults)
        raise SpecError(redacted("\n".join(dict.fromkeys(lines)))) from None


def _follows_from_another(fault: Any) -> bool:
    """A list whose entries are wrong counts as too short in pydantic's eyes, for it has no valid ones."""
    return fault["type"] == "too_short" and len(fault["input"]) > 0


def _describe(model: type[BaseModel], data: Any, place: str, fault: Any) -> str:
    kind, location = fault["type"], list(fault["loc"])
    where = _place(place, location, data) or "the file"
    if kind == "extra_forbidden":
        known = _fields_at(model, location[:-1])
        return f"{where}: unknown field{nearest(str(location[-1]), known)}"
    if kind == "missing":
        return f"{where}: missing; it is required"
    if kind == "value_error":
        text = str(fault["ctx"]["error"])
        return text if text.startswith("stages[") else f"{where}: {text}"
    if kind == "literal_error":
        expected = fault["ctx"]["expected"]
        words = expected.replace("'", "").replace(" or ", ", ").split(", ")
        return f"{where}: {fault['input']!r} is not one of {', '.join(words)}{_did_you_mean(fault['input'], words)}"
    if kind == "too_short":
        return f"{where}: empty; name at least one"
    message = fault["msg"][0].lower() + fault["msg"][1:]
    if kind in {"model_type", "model_attributes_type", "dict_type"}:
        message = "input should be a mapping"
    elif kind in {"tuple_type", "list_type"}:
        message = "input should be a list"
    return f"{where}: {message}, not {_short(fault['input'])}"


def _did_you_mean(value: Any, words: list[str]) -> str:
    hint = nearest(str(value), words)
    return hint if hint.startswith("; did") else ""


def _short(value: Any) -> str:
    text = repr(redacted(value))
    return text if len(text) <= 60 else text[:57] + "..."


def _place(place: str, location: list[Any], data: Any) -> str:
    """`stages[2] (prune).config.sparsty`: the path in the file, with the name of each list entry that has one."""
    text = place
    for step in location:
        if isinstance(step, int):
            text += f"[{step}]"
            data = data[step] if isinstance(data, list | tuple) and step < len(data) else None
            if isinstance(data, dict) and isinstance(data.get("name"), str):
                text += f" ({data['name']})"
        else:
            text += f".{step}" if text else str(step)
            data = data.get(step) if isinstance(data, dict) else None
    return text


def _fields_at(model: type[BaseModel], location: list[Any]) -> list[str]:
    """The fields of the nested model at `location` of `model`."""
    current: Any = model
    for step in location:
        if isinstance(step, str) and isinstance(current, type) and issubclass(current, BaseModel):
            field = current.model_fields.get(step)
            current = _model_in(field.annotation) if field else None
    return list(current.model_fields) if isinstance(current, type) and issubclass(current, BaseModel) else []


def _model_in(annotation: Any) -> Any:
    """The model class inside an annotation such as `tuple[Stage, ...]` or `Stage | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _model_in(argument)
        if found is not None:
            return found
    return None
