"""Where workers run, on a cluster whose nodes have resources of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def ran_on(tmp_path_factory):
    """The kind of node that each piece of work ran on. A process of its own: the tests beside this share one Ray."""
    script = Path(__file__).parent / "placement_worker.py"
    folder = tmp_path_factory.mktemp("placement")
    environment = {**os.environ, "HOME": str(folder), "RAY_AUTH_MODE": "token"}
    ray = Path(sys.executable).with_name("ray")
    subprocess.run([ray, "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
    done = subprocess.run(
        [sys.executable, script, folder],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


T4 = "accelerator_type:T4"


@pytest.mark.slow
def test_work_goes_to_the_nodes_that_have_what_it_asks_for(ran_on):
    assert ran_on["capacity"] == "6 CPUs, 2 licence and accelerator T4 on 3 nodes"
    assert ran_on["task"] == T4
    assert ran_on["alone"] == ["licence"]
    assert ran_on["together"] == ["licence", "licence"]
    assert ran_on["trials"] == [T4] * 3


@pytest.mark.slow
def test_workers_that_train_together_are_packed_or_spread(ran_on):
    assert len(set(ran_on["packed"])) == 1
    assert len(set(ran_on["spread"])) == 2
