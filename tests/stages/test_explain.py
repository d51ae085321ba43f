"""`plan` says how a strategy will spread the model, without training it."""

import pytest

from heliostat.core.load import load_pipeline
from heliostat.runner import plan


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("tp", "tp: 0 colwise, 2 rowwise"),
        ("pp", "pp: from 0 144 parameters, from 2 323 parameters"),
        ({"fsdp": {"wrap": "Linear"}}, "fsdp: 3 units and the rest, over 2 workers"),
    ],
    ids=["tp", "pp", "fsdp"],
)
def test_the_plan_shows_what_a_strategy_will_do(toy, strategy, expected):
    document = toy.document
    train = document["stages"][1]
    del train["inputs"]
    train |= {"config": {"strategy": strategy}, "resources": {"workers": 2}}
    document["stages"] = [train]
    toy.write(document)
    assert plan(load_pipeline(toy.file)).node("train").explained == {"strategy": expected}
