"""A stage that is a task and hangs."""

import json

import pytest

STUCK = """

import time
from pathlib import Path


class Stuck(torch.optim.SGD):
    def step(self, closure=None):
        mark = Path({mark!r})
        if not mark.exists():
            mark.touch()
            time.sleep(600)
        return super().step(closure)
"""


@pytest.mark.slow
def test_a_stage_that_hangs_fails_with_the_place_and_the_same_command_goes_on(toy, heliostat):
    toy.module.write_text(toy.module.read_text() + STUCK.format(mark=str(toy.folder / "stuck")))
    tuning = {"finetune_epochs": 1, "optimizer": {"name": "toy:Stuck", "lr": 0.01}}
    stages = [
        {"name": "train", "uses": "train", "config": {"epochs": 1}},
        {
            "name": "prune",
            "uses": "prune",
            "inputs": {"model": "train"},
            "config": tuning,
            "resources": {"hang_timeout_s": 4},
        },
    ]
    toy.write({**toy.document, "stages": stages})
    failed = heliostat("run", toy.file)
    assert failed.returncode == 1
    assert "prune: failed: it hangs: no sign of life for 4 s (resources.hang_timeout_s)" in failed.stderr
    assert 'toy.py", line' in failed.stderr
    done = heliostat("run", toy.file, "--json")
    assert done.returncode == 0, done.stderr
    assert [node["status"] for node in json.loads(done.stdout)["nodes"]] == ["reused", "ran"]
