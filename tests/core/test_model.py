"""What of a config is part of identity."""

from typing import Annotated

import pytest
from pydantic import Field

from heliostat.core.model import ADDED, NOT_IDENTITY, Count, Spec


class Inner(Spec):
    size: int = 1
    added: Annotated[int, ADDED] = 0


class Outer(Spec):
    what: str = "a"
    how: Annotated[Count | None, NOT_IDENTITY] = None
    inner: Inner = Inner()
    several: tuple[Inner, ...] = ()
    named: dict[str, Inner] = Field(default_factory=dict)


def test_a_field_that_says_how_is_never_part_of_identity():
    assert Outer(how=3).identity() == Outer().identity()
    assert "how" not in Outer(how=3).identity()


def test_an_added_field_is_part_of_identity_only_away_from_its_default():
    assert Outer().identity()["inner"] == {"size": 1}
    assert Outer(inner=Inner(added=2)).identity()["inner"] == {"size": 1, "added": 2}


@pytest.mark.parametrize("field", [{"several": (Inner(),)}, {"named": {"x": Inner()}}])
def test_marks_count_within_lists_and_mappings(field):
    (value,) = (
        Outer(**field).identity()[next(iter(field))]
        if "several" in field
        else [Outer(**field).identity()["named"]["x"]]
    )
    assert value == {"size": 1}


def test_a_config_without_marked_fields_is_its_own_identity():
    assert Inner(added=4).identity() == Inner(added=4).model_dump(mode="json")
