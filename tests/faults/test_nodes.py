"""Nodes of a cluster that come and go, the latter by SIGKILL, while workers train on them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EPOCHS = 120
"""Half a second each, until the test is in a hurry."""


class Nodes:
    """A Ray whose nodes are started and killed from here."""

    def __init__(self, folder: Path) -> None:
        self.environment = {**os.environ, "HOME": str(folder), "RAY_AUTH_MODE": "token", "OMP_NUM_THREADS": "1"}
        ray = Path(sys.executable).with_name("ray")
        subprocess.run([ray, "get-auth-token", "--generate"], env=self.environment, check=True, capture_output=True)
        script = Path(__file__).with_name("nodes.py")
        with open(folder / "nodes.log", "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, script],
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.address = self._answer()

    def add(self) -> str:
        self._tell("add")
        return self._answer()

    def kill(self, node: str) -> None:
        self._tell(f"kill {node}")
        self._answer()

    def end(self) -> None:
        self.process.communicate(timeout=60)

    def _tell(self, command: str) -> None:
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()

    def _answer(self) -> str:
        return self.process.stdout.readline().strip()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """One head where the driver runs, and two nodes with a seat for one worker each."""
    cluster = Nodes(tmp_path_factory.mktemp("nodes"))
    cluster.add()
    cluster.add()
    yield cluster
    cluster.end()


@pytest.fixture
def training(watched, nodes):
    """One on the cluster, each of its workers on a seat."""
    training = watched(nodes.environment)

    def start(*, resources, **stage) -> None:
        resources["custom_resources"] = {"seat": 1}
        config = {"epochs": EPOCHS, "strategy": "ddp"}
        begin("--address", nodes.address, config=config, resources=resources, **stage)

    begin, training.start = training.start, start
    return training


def steps(rows) -> list[int]:
    return [step for step, _ in rows]


@pytest.mark.slow
def test_an_elastic_training_shrinks_when_a_node_leaves_and_grows_when_one_comes(training, nodes, tracked, details):
    training.start(resources={"workers": {"min": 1, "max": 2}})
    training.waits_for(lambda: training.epoch() >= 2, "two epochs")
    assert [worker.size for worker in training.workers()] == [2, 2]

    nodes.kill(training.workers()[0].node)
    training.waits_for(lambda: len(training.workers()) == 3, "one worker goes on")
    assert training.workers()[2].size == 1
    training.goes_on()

    nodes.add()
    training.waits_for(lambda: len(training.workers()) == 5, "two workers go on")
    assert [worker.size for worker in training.workers()[3:]] == [2, 2]
    training.goes_on()

    printed, _ = training.finish()
    workers = tracked(printed, "train", "workers")
    assert steps(workers) == list(range(1, EPOCHS + 1))
    sizes = [size for _, size in workers]
    assert [size for n, size in enumerate(sizes) if n == 0 or size != sizes[n - 1]] == [2, 1, 2]
    assert len(details(printed)["history"]) == EPOCHS


@pytest.mark.slow
def test_a_training_whose_node_was_lost_goes_on_on_another_as_one_of_its_retries(training, nodes, tracked, details):
    training.start(resources={"workers": 2}, retries=1)
    training.waits_for(lambda: training.epoch() >= 2, "two epochs")
    replacement, lost, kept = nodes.add(), training.workers()[0].node, training.history()
    nodes.kill(lost)
    training.waits_for(lambda: len(training.workers()) == 4, "two more began")
    assert {worker.node for worker in training.workers()[2:]} == {replacement, training.workers()[1].node}
    training.goes_on()

    printed, said = training.finish()
    history = details(printed)["history"]
    assert history[: len(kept)] == kept  # to the microsecond of each epoch's duration
    assert len(history) == EPOCHS
    assert steps(tracked(printed, "train", "val_loss")) == [*range(1, EPOCHS + 1), EPOCHS + 1]
    assert said.count("training goes on from its last checkpoint") == 1


@pytest.fixture
def blind_node(toy, nodes):
    """A node that has a disk of its own where the others have the toy's store. Only root may make one."""
    store = toy.folder / ".heliostat"
    store.mkdir()
    ray = Path(sys.executable).with_name("ray")
    start = f"mount -t tmpfs tmpfs {store} && exec {ray} start --address {nodes.address} --num-cpus 1 --block"
    process = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", start],
        env=nodes.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout:
        if "--block" in line:
            break
    else:
        pytest.skip("needs the right to mount a file system")
    yield
    process.terminate()
    process.communicate(timeout=60)


@pytest.mark.slow
def test_a_run_whose_folder_another_machine_does_not_see_is_refused_before_anything_starts(
    toy, heliostat, nodes, blind_node, s3
):
    arguments = [*heliostat.command, "run", str(toy.file), "--address", nodes.address]
    environment = {**nodes.environment, **s3.environment}
    for more, said in (([], "all of them share\n"), (["--set", "storage=s3://models/team"], "and sends from there\n")):
        done = subprocess.run([*arguments, *more], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert f"error: storage: 1 of 4 nodes do not see this machine's {toy.folder / '.heliostat'}" in done.stderr
        assert said in done.stderr
        assert "search: starts" not in done.stderr
