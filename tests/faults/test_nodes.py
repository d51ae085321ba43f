"""Nodes of a cluster that come and go, the latter by SIGKILL, while workers train on them."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

WATCHED = """

import os
import time
from pathlib import Path

import ray

quick_accuracy, plain_model, folder = accuracy, build_model, Path({folder!r})


def build_model(width=16):
    if "WORLD_SIZE" in os.environ:
        with open(folder / "builds.txt", "a") as file:
            file.write(f"{{os.environ['WORLD_SIZE']}} {{ray.get_runtime_context().get_node_id()}}\\n")
    return plain_model(width)


def accuracy(outputs, targets):
    time.sleep(0 if (folder / "hurry").exists() else 0.5)
    return quick_accuracy(outputs, targets)
"""
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


class Training:
    """The toy's training on the cluster, watched while it runs."""

    def __init__(self, toy, heliostat, nodes, eventually, **fields) -> None:
        toy.module.write_text(toy.module.read_text() + WATCHED.format(folder=str(toy.folder)))
        document = toy.document
        fields["resources"]["custom_resources"] = {"seat": 1}
        document["stages"] = [
            {"name": "train", "uses": "train", "config": {"epochs": EPOCHS, "strategy": "ddp"}, **fields}
        ]
        toy.write(document)
        self._folder, self._eventually = toy.folder, eventually
        self._process = subprocess.Popen(
            [*heliostat.command, "run", str(toy.file), "--address", nodes.address, "--json"],
            env=nodes.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def builds(self) -> list[tuple[int, str]]:
        """The number of workers and the node of each time that a worker began."""
        file = self._folder / "builds.txt"
        lines = file.read_text().splitlines() if file.exists() else []
        return [(int(size), node) for size, node in map(str.split, lines)]

    def epoch(self) -> int:
        """That of the newest checkpoint."""
        return max((int(path.name[6:11]) for path in self._checkpoints()), default=0)

    def _checkpoints(self) -> list[Path]:
        return list(self._folder.glob(".heliostat/toy/train/*/checkpoints/epoch-*.pt"))

    def goes_on(self, *, num_epochs: int = 2) -> None:
        """Wait for so many epochs more."""
        until = self.epoch() + num_epochs
        self.waits_for(lambda: self.epoch() >= until, f"epoch {until}")

    def waits_for(self, condition, what: str) -> None:
        started = time.monotonic()
        self._eventually(condition, what, unless=lambda: self._process.poll() is not None)
        print(f"{what} after {time.monotonic() - started:.1f} s")

    def finish(self) -> str:
        """Let it end soon; what it printed."""
        (self._folder / "hurry").touch()
        printed, said = self._process.communicate(timeout=240)
        assert self._process.returncode == 0, said
        return printed

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()


@pytest.fixture
def train(toy, heliostat, nodes, eventually):
    started = []

    def train(**fields):
        started.append(Training(toy, heliostat, nodes, eventually, **fields))
        return started[-1]

    yield train
    for training in started:
        training.kill()


def history(printed: str) -> list[dict[str, float]]:
    (node,) = json.loads(printed)["nodes"]
    return json.loads((Path(node["path"]) / "record.json").read_text())["details"]["history"]


@pytest.mark.slow
def test_an_elastic_training_shrinks_when_a_node_leaves_and_grows_when_one_comes(train, nodes, tracked):
    training = train(resources={"workers": {"min": 1, "max": 2}})
    training.waits_for(lambda: training.epoch() >= 2, "two epochs")
    assert [size for size, _ in training.builds()] == [2, 2]

    nodes.kill(training.builds()[0][1])
    training.waits_for(lambda: len(training.builds()) == 3, "one worker goes on")
    assert training.builds()[2][0] == 1
    training.goes_on()

    nodes.add()
    training.waits_for(lambda: len(training.builds()) == 5, "two workers go on")
    assert [size for size, _ in training.builds()[3:]] == [2, 2]
    training.goes_on()

    printed = training.finish()
    workers = tracked(printed, "train", "workers")
    assert [step for step, _ in workers] == list(range(1, EPOCHS + 1))
    sizes = [size for _, size in workers]
    assert [size for n, size in enumerate(sizes) if n == 0 or size != sizes[n - 1]] == [2, 1, 2]
    assert len(history(printed)) == EPOCHS
