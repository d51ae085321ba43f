"""The base of every object that a pipeline file describes: frozen, strict, and without unknown fields."""

from collections.abc import Mapping
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, Strict

NOT_IDENTITY: Final = "not identity"
"""Mark of a field that says how or where and never what: `Annotated[Count | None, NOT_IDENTITY]`."""
ADDED: Final = "added"
"""Mark of a field that did not exist when records were already stored. At its default it is left out of identity, so
that the stored records stay valid."""


class Spec(BaseModel):
    """A frozen record that refuses unknown fields."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        validate_default=False,
        ser_json_inf_nan="constants",
        hide_input_in_errors=True,  # it may be a password
    )

    def identity(self) -> dict[str, Any]:
        """Return the values that identity consists of, as JSON values: all fields but those marked otherwise."""
        document: dict[str, Any] = self.model_dump(mode="json")
        _drop_marked(self, document)
        return document

    def settings(self) -> dict[str, Any]:
        """Return the fields that say how and never what, as JSON values."""
        marked = {name for name, field in type(self).model_fields.items() if NOT_IDENTITY in field.metadata}
        return self.model_dump(mode="json", include=marked)

    @property
    def code_references(self) -> tuple[str, ...]:
        """The `module:attribute` of user code that the config names: its source is part of a node's identity."""
        return ()


def _drop_marked(value: Any, document: Any) -> None:
    if isinstance(value, Spec):
        for name, field in type(value).model_fields.items():
            own = getattr(value, name)
            is_default = ADDED in field.metadata and own == field.get_default(call_default_factory=True)
            if NOT_IDENTITY in field.metadata or is_default:
                del document[name]
            else:
                _drop_marked(own, document[name])
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _drop_marked(item, document.get(key))
    elif isinstance(value, list | tuple):
        for item, part in zip(value, document):
            _drop_marked(item, part)


Integer = Annotated[int, Strict()]
Count = Annotated[int, Strict(), Field(ge=1)]
"""A whole number, 1 or more. `true` and `"3"` are not numbers."""
NonNegativeInt = Annotated[int, Strict(), Field(ge=0)]
Number = Annotated[float, Strict()]
Positive = Annotated[float, Strict(), Field(gt=0)]
NonNegative = Annotated[float, Strict(), Field(ge=0)]
Fraction = Annotated[float, Strict(), Field(ge=0, lt=1)]
"""A number in [0, 1)."""
Flag = Annotated[bool, Strict()]
