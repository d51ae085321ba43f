"""How a run is disturbed, and what it has in MLflow afterwards."""

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

WATCHED = """

import os
import time
from pathlib import Path

import ray

quick_accuracy, plain_model, folder = accuracy, build_model, Path({folder!r})


def build_model(width=16):
    if "WORLD_SIZE" in os.environ:
        with open(folder / "workers.txt", "a") as file:
            file.write(f"{{os.environ['WORLD_SIZE']}} {{os.getpid()}} {{ray.get_runtime_context().get_node_id()}}\\n")
    return plain_model(width)


def accuracy(outputs, targets):
    time.sleep(0 if (folder / "hurry").exists() else 0.5)
    return quick_accuracy(outputs, targets)
"""


class Nodes:
    """A Ray whose nodes are started and killed from here."""

    def __init__(self, folder: Path, find_processes) -> None:
        self._find_processes = find_processes
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

    def add_apart(self, store: Path, **environment: str) -> str:
        """One that has a disk of its own where the others have the store. Only root may start it; gives its name."""
        store.mkdir(exist_ok=True)
        name, ray = uuid.uuid4().hex, Path(sys.executable).with_name("ray")
        options = f"--address {self.address} --num-cpus 1 --resources '{{\"seat\": 1}}' --block"
        process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", f"mount -t tmpfs tmpfs {store} && exec {ray} start {options}"],
            env={**self.environment, **environment, "NODE_APART": name},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for line in process.stdout:
            if "--block" in line:
                return name
        pytest.skip("needs the right to mount a file system")

    def kill_apart(self, name: str) -> None:
        for pid in self._find_processes(f"NODE_APART={name}"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        self.process.communicate(timeout=60)

    def _tell(self, command: str) -> None:
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()

    def _answer(self) -> str:
        return self.process.stdout.readline().strip()


@pytest.fixture(scope="session")
def cluster_of_nodes(processes_with):
    """Starts one, in a folder."""
    return lambda folder: Nodes(folder, processes_with)


class Worker(NamedTuple):
    """One of so many that began together."""

    size: int
    pid: int
    node: str


class Training:
    """The toy's training by several workers, half a second an epoch until it is in a hurry, watched while it runs."""

    def __init__(self, toy, command, environment, eventually, processes_with) -> None:
        toy.module.write_text(toy.module.read_text() + WATCHED.format(folder=str(toy.folder)))
        self._toy, self._command, self._eventually, self._processes_with = toy, command, eventually, processes_with
        self._environment = {**environment, "TOY_FOLDER": str(toy.folder)}

    def start(self, *arguments: str, **stage) -> None:
        """`run` with these arguments, of one stage."""
        self._toy.write({**self._toy.document, "stages": [{"name": "train", "uses": "train", **stage}]})
        self.go_on(*arguments)

    def go_on(self, *arguments: str) -> None:
        """The same command again."""
        self._process = subprocess.Popen(
            [*self._command, "run", str(self._toy.file), *arguments, "--json"],
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def workers(self) -> list[Worker]:
        """Each that began, in order."""
        file = self._toy.folder / "workers.txt"
        lines = file.read_text().splitlines() if file.exists() else []
        return [Worker(int(size), int(pid), node) for size, pid, node in map(str.split, lines)]

    def checkpoints(self) -> list[Path]:
        """The newest first."""
        found = self._toy.folder.glob(".heliostat/toy/train/*/checkpoints/epoch-*")
        return sorted((path for path in found if path.suffix != ".tmp"), reverse=True)

    def epoch(self) -> int:
        """That of the newest checkpoint."""
        return int(self.checkpoints()[0].name[6:11]) if self.checkpoints() else 0

    def goes_on(self, *, num_epochs: int = 2) -> None:
        """Wait for so many epochs more."""
        until = self.epoch() + num_epochs
        self.waits_for(lambda: self.epoch() >= until, f"epoch {until}")

    def waits_for(self, condition, what: str) -> None:
        self._eventually(condition, what, unless=lambda: self._process.poll() is not None)

    def finish(self) -> tuple[str, str]:
        """Let it end soon; what it printed, and what it said to a person."""
        (self._toy.folder / "hurry").touch()
        printed, said = self._process.communicate(timeout=240)
        assert self._process.returncode == 0, said
        return printed, said

    def history(self) -> list[dict[str, float]]:
        """The epochs that the newest checkpoint tells of."""
        newest = self.checkpoints()[0]
        state = torch.load(newest / "plain.pt" if newest.is_dir() else newest, weights_only=True)
        return state["progress"]["history"]

    def kill(self) -> None:
        """The command and all that it has started here."""
        for pid in self._processes_with(f"TOY_FOLDER={self._toy.folder}"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.communicate()


@pytest.fixture
def watched(toy, heliostat, eventually, processes_with):
    """Makes a training that can be watched, for a Ray that its environment tells of."""
    made = []

    def make(environment: Mapping[str, str]) -> Training:
        made.append(Training(toy, heliostat.command, environment, eventually, processes_with))
        return made[-1]

    yield make
    for training in made:
        training.kill()


@pytest.fixture
def training(watched, heliostat):
    """One on a Ray of its own."""
    return watched(heliostat.environment)


@pytest.fixture(scope="session")
def kill_when(eventually, processes_with):
    """Runs a command, kills it with SIGKILL when a moment has come, and waits until nothing that it started is left.

    `cwd` is the folder it runs in; the one variable of the environment that is given tells what it started. Gives what
    it wrote to standard error.
    """

    def kill_when(cli, *arguments, cwd, moment, what, **environment) -> str:
        (mark,) = (f"{name}={value}" for name, value in environment.items())
        process = subprocess.Popen(
            [*cli.command, *map(str, arguments)],
            cwd=cwd,
            env={**cli.environment, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            eventually(moment, what, unless=lambda: process.poll() is not None)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        said = process.communicate()[1]
        eventually(lambda: not processes_with(mark), "processes outlive their driver", timeout_s=150)
        return said

    return kill_when


@pytest.fixture(scope="session")
def details():
    """The details of the only node's record, given what `run --json` printed."""

    def read(printed: str) -> dict:
        (node,) = json.loads(printed)["nodes"]
        return json.loads((Path(node["path"]) / "record.json").read_text())["details"]

    return read


@pytest.fixture(scope="session")
def tracked_run():
    """The MLflow client, and the run called `name`, given what `run --json` printed."""
    from heliostat.tracking import quiet

    quiet.silence()
    import mlflow

    def find(printed: str, name: str):
        tracking = json.loads(printed)["tracking"]
        client = mlflow.MlflowClient(tracking["uri"])
        experiment = client.get_experiment_by_name(tracking["experiment"])
        (run,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
        return client, run

    return find


@pytest.fixture(scope="session")
def tracked(tracked_run):
    """The rows (step, value) of a metric of the run called `name`, in order, given what `run --json` printed."""

    def rows(printed: str, name: str, metric: str) -> list[tuple[int, float]]:
        client, run = tracked_run(printed, name)
        return sorted((row.step, row.value) for row in client.get_metric_history(run.info.run_id, metric))

    return rows
