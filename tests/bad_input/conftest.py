"""One way to ask what is wrong with the toy pipeline when a few of its values are changed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from heliostat.core.load import load_pipeline
from heliostat.errors import HeliostatError, SpecError
from heliostat.runner import plan

MODULE = """

def one(a):
    return 0


def with_more(outputs, targets, *, weight):
    return 0


def loop(context, config):
    return None


def step(model, batch):
    return 0


def reader(path):
    return {}


number = 3
"""


def _change(document: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    for path, value in changes.items():
        *parents, last = path.split("/")
        target: Any = document
        for step in parents:
            if isinstance(target, list):
                target = next(entry for entry in target if entry["name"] == step)
            else:
                target = target.setdefault(step, {})
        if value is ...:
            del target[last]
        else:
            target[last] = value
    return document


@pytest.fixture
def change() -> Callable[[dict[str, Any], Mapping[str, Any]], dict[str, Any]]:
    """A document with values put at paths such as `stages/train/config/epochs`; `...` takes the key away."""
    return _change


@pytest.fixture
def refusal(toy):
    """Load and plan the toy pipeline with changes; the error that comes of it, which left no trace in the store."""
    toy.module.write_text(toy.module.read_text() + MODULE)

    def attempt(
        changes: Mapping[str, Any] | None = None,
        *,
        text: str | None = None,
        settings: Sequence[str] = (),
        force: Sequence[str] = (),
    ) -> HeliostatError:
        toy.write(_change(toy.document, changes or {}))
        if text is not None:
            toy.file.write_text(text)
        with pytest.raises(HeliostatError) as caught:
            plan(load_pipeline(toy.file, settings=settings), force=force)
        assert isinstance(caught.value, SpecError)
        assert caught.value.exit_code == 2
        assert not (toy.folder / ".heliostat").exists()
        return caught.value

    return attempt
