"""What all tests share: one toy task, the command line as a process of its own, and user modules that do not leak."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

os.environ.setdefault("RAY_worker_niceness", "0")  # of Ray's default, 15, two test processes would let nothing remain


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Two processes share the tests (`-n 2`): one has all that use the one Ray, and one all that look at whole runs."""
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class ByWhatTheyShare(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            folder = file.split("/")[1]
            return {"runtime": "one Ray", "integration": "runs", "faults": "runs"}.get(folder, file)

    return ByWhatTheyShare(config, log)


TOY = '''\
import torch
from torch import nn
from torch.utils.data import TensorDataset


def build_model(width=16, bias=True):
    return nn.Sequential(
        nn.Linear(8, width, bias=bias), nn.ReLU(), nn.Linear(width, width, bias=bias), nn.ReLU(), nn.Linear(width, 3)
    )


def build_data(seed=0):
    """600 points of 8 features in three classes that a plane each tells apart."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(600, 8, generator=generator)
    targets = (inputs @ torch.randn(8, 3, generator=generator)).argmax(1)
    parts = {"train": slice(0, 400), "val": slice(400, 500), "test": slice(500, 600)}
    return {split: TensorDataset(inputs[rows], targets[rows]) for split, rows in parts.items()}


def accuracy(outputs, targets):
    return (outputs.argmax(1) == targets).float().mean().item()
'''

PIPELINE = yaml.safe_load(
    """
    name: toy
    task: {model: "toy:build_model", data: "toy:build_data", metrics: ["toy:accuracy"]}
    stages:
      - name: search
        uses: tune
        config:
          algorithm: bayesian
          trials: 4
          space:
            optimizer.lr: {loguniform: [0.001, 0.1]}
            model_args.width: {choice: [8, 16]}
          train: {epochs: 2}
      - {name: train, uses: train, inputs: {params: search}, config: {epochs: 3}}
      - name: prune
        uses: prune
        inputs: {model: train}
        matrix: {sparsity: [0.25, 0.5]}
        config: {finetune_epochs: 1}
      - {name: student, uses: distill, inputs: {teacher: train}, config: {model_args: {width: 4}, epochs: 2}}
      - {name: int8, uses: quantize, inputs: {model: [train, prune, student]}}
      - name: best
        uses: select
        inputs: {baseline: train, candidates: [train, prune, student, int8]}
        config: {max_drop: {val_accuracy: 0.1}}
    """
)


@dataclass(frozen=True)
class Toy:
    """A folder with `toy.py` and `toy.yaml`: every kind of stage on a task that trains in well under a second."""

    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / "toy.yaml"

    @property
    def module(self) -> Path:
        return self.folder / "toy.py"

    @property
    def document(self) -> dict[str, Any]:
        """The standard pipeline as a plain dict: a copy, to be changed and given to `write`."""
        return deepcopy(PIPELINE)

    def write(self, document: dict[str, Any], name: str = "toy.yaml") -> Path:
        path = self.folder / name
        path.write_text(yaml.safe_dump(document, sort_keys=False))
        return path


@pytest.fixture(scope="session")
def toy_in() -> Callable[[Path], Toy]:
    """Makes a new folder with the toy task and its standard pipeline, for fixtures that live longer than one test."""

    def make(folder: Path) -> Toy:
        folder.mkdir()
        made = Toy(folder)
        made.module.write_text(TOY)
        made.write(PIPELINE)
        return made

    return make


@pytest.fixture
def toy(tmp_path: Path, toy_in: Callable[[Path], Toy]) -> Toy:
    """A new folder with the toy task and its standard pipeline."""
    return toy_in(tmp_path / "toy")


@dataclass(frozen=True)
class CommandLine:
    """The `heliostat` command as a process, with the working directory off the import path as in the real one."""

    folder: Path

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-P", "-m", "heliostat.cli"]

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "OMP_NUM_THREADS": "1"}

    def __call__(
        self, *arguments: str | Path, cwd: Path | None = None, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end, from `cwd` (a temporary folder unless told)."""
        return subprocess.run(
            [*self.command, *map(str, arguments)],
            cwd=cwd or self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def start(self, *arguments: str | Path, cwd: Path | None = None) -> subprocess.Popen[str]:
        """Start it in a process group of its own; whoever starts it ends it."""
        return subprocess.Popen(
            [*self.command, *map(str, arguments)],
            cwd=cwd or self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


@pytest.fixture(scope="session")
def heliostat_in() -> Callable[[Path], CommandLine]:
    """The command line with a given folder as its working directory, for fixtures that live longer than one test."""
    return CommandLine


@pytest.fixture
def heliostat(tmp_path: Path) -> CommandLine:
    return CommandLine(tmp_path)


class S3:
    """A server of the S3 protocol on this machine, with one bucket, that can be stopped and started again."""

    def __init__(self) -> None:
        self._port = 0
        self.start()
        self.client.create_bucket(Bucket="models")

    def start(self) -> None:
        from moto.server import ThreadedMotoServer

        self._server = ThreadedMotoServer("127.0.0.1", self._port, verbose=False)
        self._server.start()
        self._port = self._server.get_host_and_port()[1]

    def stop(self) -> None:
        self._server.stop()
        self._server._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """How AWS's tools, and so Heliostat, find it."""
        keys = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
        return {**keys, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._port}"}

    @property
    def client(self) -> Any:
        """boto3's."""
        import boto3

        names = {"AWS_ENDPOINT_URL": "endpoint_url", "AWS_DEFAULT_REGION": "region_name"}
        return boto3.client("s3", **{names.get(key, key.lower()): value for key, value in self.environment.items()})

    def objects(self) -> dict[str, int]:
        """The size of each object of the bucket."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket="models")
        return {found["Key"]: found["Size"] for page in pages for found in page.get("Contents", ())}


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """A server with an empty bucket `models`, where this process and those that it starts look for S3."""
    from moto.moto_api._internal import moto_api_backend

    server = S3()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    yield server
    server.stop()
    moto_api_backend.reset()


@dataclass(frozen=True)
class Finished:
    """The toy's folder after `heliostat run toy.yaml --json`, and what that printed."""

    folder: Path
    process: subprocess.CompletedProcess[str]

    @property
    def file(self) -> Path:
        return self.folder / "toy.yaml"

    @property
    def store(self) -> Path:
        return self.folder / ".heliostat"

    @property
    def document(self) -> dict[str, Any]:
        return json.loads(self.process.stdout)

    @property
    def nodes(self) -> dict[str, dict[str, Any]]:
        return {node["name"]: node for node in self.document["nodes"]}

    def path(self, node: str) -> Path:
        return Path(self.nodes[node]["path"])

    def record(self, node: str) -> dict[str, Any]:
        return json.loads((self.path(node) / "record.json").read_text())


@pytest.fixture(scope="session")
def finished(tmp_path_factory, toy_in, heliostat_in) -> Finished:
    """The standard pipeline, trained by two workers, with two models more, run once and from another folder."""
    toy = toy_in(tmp_path_factory.mktemp("finished") / "toy")
    document = toy.document
    document["stages"][0]["config"]["scheduler"] = "asha"
    document["stages"][1]["resources"] = {"workers": 2}
    best = document["stages"].pop()
    document["stages"] += [
        {
            "name": "sparse",
            "uses": "prune",
            "inputs": {"model": "train"},
            "config": {"method": "magnitude", "sparsity": 0.5, "finetune_epochs": 1},
        },
        {"name": "onnx", "uses": "export", "inputs": {"model": "student"}},
        best,
    ]
    toy.write(document)
    for command in ("init -q", "add toy.py toy.yaml", "-c user.name=t -c user.email=t@example.org commit -qm toy"):
        subprocess.run(["git", *command.split()], cwd=toy.folder, check=True)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    return Finished(toy.folder, heliostat_in(elsewhere)("run", toy.file, "--json", timeout=560))


@dataclass(frozen=True)
class Copy:
    """A copy of a finished toy with its store, to be changed at will."""

    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / "toy.yaml"

    @property
    def module(self) -> Path:
        return self.folder / "toy.py"

    @property
    def store(self) -> Path:
        return self.folder / ".heliostat"

    def change(self, stage: str | None = None, /, **fields: Any) -> None:
        """Set fields of a stage, or of the whole pipeline."""
        document = yaml.safe_load(self.file.read_text())
        target = document if stage is None else next(s for s in document["stages"] if s["name"] == stage)
        target.update(fields)
        self.file.write_text(yaml.safe_dump(document, sort_keys=False))


@pytest.fixture
def copy(finished: Finished, tmp_path: Path) -> Copy:
    shutil.copytree(finished.folder, tmp_path / "copy", ignore=shutil.ignore_patterns(".git"))
    return Copy(tmp_path / "copy")


@pytest.fixture(scope="session")
def eventually() -> Callable[..., None]:
    """Waits until a condition holds; fails with `what` after `timeout_s`, or as soon as `unless` holds."""

    def wait(
        condition: Callable[[], bool], what: str, *, timeout_s: float = 240, unless: Callable[[], bool] | None = None
    ) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"after {timeout_s:.0f} s: {what}"
            assert unless is None or not unless(), f"too late: {what}"
            time.sleep(0.05)

    return wait


@pytest.fixture(scope="session")
def processes_with() -> Callable[[str], list[int]]:
    """The processes whose environment has a given `NAME=value`: all that a command started, whatever its group."""

    def find(variable: str) -> list[int]:
        found = []
        for environment in Path("/proc").glob("[0-9]*/environ"):
            try:
                if variable.encode() in environment.read_bytes().split(b"\0"):
                    found.append(int(environment.parent.name))
            except OSError:
                continue  # it ended meanwhile, or is another user's
        return [pid for pid in found if pid != os.getpid()]

    return find


@pytest.fixture(autouse=True)
def _user_modules_do_not_leak(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Each test's `toy` is its own: modules from temporary folders are forgotten, and so is the import path."""
    path = list(sys.path)
    yield
    sys.path[:] = path
    temporary = f"{tmp_path_factory.getbasetemp()}{os.sep}"
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(temporary):
            del sys.modules[name]
