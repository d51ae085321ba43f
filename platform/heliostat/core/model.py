"""The base of every object that a pipeline file describes: frozen, strict, and without unknown fields."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, Strict


class Spec(BaseModel):
    """A frozen record that refuses unknown fields."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_default=False, ser_json_inf_nan="constants"
    )

    @property
    def code_references(self) -> tuple[str, ...]:
        """The `module:attribute` of user code that the config names: its source is part of a node's identity."""
        return ()


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
