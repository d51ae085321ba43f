"""One finished run of the toy pipeline that most tests here look at, and copies of it for those that change it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml


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
    """The standard pipeline with a magnitude-pruned model and an export besides, run once from another folder."""
    toy = toy_in(tmp_path_factory.mktemp("finished") / "toy")
    document = toy.document
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


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., str]:
    """Runs a script in a fresh process, from a folder of its own, and gives what it printed."""

    def run(script: str, *arguments: str | Path) -> str:
        folder = tmp_path / "fresh"
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-P", "-c", script, *map(str, arguments)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
