"""`kill -9` of the workers of a training that several run together."""

import json
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
import torch

SLOW = """

import os
import time
from pathlib import Path

quick_accuracy, plain_model, folder = accuracy, build_model, Path({folder!r})


def build_model(width=16):
    if "RANK" in os.environ:
        with open(folder / "workers.txt", "a") as file:
            file.write(f"{{os.getpid()}}\\n")
    return plain_model(width)


def accuracy(outputs, targets):
    time.sleep(0 if (folder / "hurry").exists() else 0.5)
    return quick_accuracy(outputs, targets)
"""
EPOCHS = 100
"""Half a second each, until the test is in a hurry."""


class Training:
    """The toy's training by two workers, watched while it runs."""

    def __init__(self, toy, heliostat, eventually) -> None:
        toy.module.write_text(toy.module.read_text() + SLOW.format(folder=str(toy.folder)))
        self._toy, self._heliostat, self._eventually = toy, heliostat, eventually

    def start(self, *, retries: int) -> None:
        document = self._toy.document
        stage = {"name": "train", "uses": "train", "resources": {"workers": 2}, "retries": retries}
        document["stages"] = [{**stage, "config": {"epochs": EPOCHS}}]
        self._toy.write(document)
        self._process = subprocess.Popen(
            [*self._heliostat.command, "run", str(self._toy.file), "--json"],
            env={**self._heliostat.environment, "TOY_FOLDER": str(self._toy.folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def workers(self) -> list[int]:
        """The process of each time that a worker began."""
        file = self._toy.folder / "workers.txt"
        return list(map(int, file.read_text().split())) if file.exists() else []

    def checkpoints(self) -> list[Path]:
        """The newest first."""
        found = self._toy.folder.glob(".heliostat/toy/train/*/checkpoints/epoch-*")
        return sorted((path for path in found if path.suffix != ".tmp"), reverse=True)

    def epoch(self) -> int:
        return int(self.checkpoints()[0].name[6:11]) if self.checkpoints() else 0

    def waits_for(self, condition, what: str) -> None:
        self._eventually(condition, what, unless=lambda: self._process.poll() is not None)

    def goes_on(self) -> None:
        until = self.epoch() + 2
        self.waits_for(lambda: self.epoch() >= until, f"epoch {until}")

    def finish(self) -> str:
        """Let it end soon; what it printed."""
        (self._toy.folder / "hurry").touch()
        printed, said = self._process.communicate(timeout=240)
        assert self._process.returncode == 0, said
        return printed

    def kill(self, processes) -> None:
        """The command and all that it has started."""
        for pid in processes:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.communicate()


@pytest.fixture
def training(toy, heliostat, eventually, processes_with):
    training = Training(toy, heliostat, eventually)
    yield training
    training.kill(processes_with(f"TOY_FOLDER={toy.folder}"))


def history(printed: str) -> list[dict[str, float]]:
    (node,) = json.loads(printed)["nodes"]
    return json.loads((Path(node["path"]) / "record.json").read_text())["details"]["history"]


@pytest.mark.slow
def test_training_goes_on_from_its_last_checkpoint_after_one_worker_and_after_all_were_killed(training, tracked):
    training.start(retries=2)
    for killed in (1, 2):  # of the two that were started last
        training.goes_on()
        workers = training.workers()
        kept = torch.load(training.checkpoints()[0], weights_only=True)["progress"]["history"]
        for pid in workers[-killed:]:
            os.kill(pid, signal.SIGKILL)
        training.waits_for(lambda before=workers: len(training.workers()) == len(before) + 2, "two more began")
    training.goes_on()
    printed = training.finish()
    assert history(printed)[: len(kept)] == kept  # to the microsecond of each epoch's duration
    assert len(history(printed)) == EPOCHS
    steps = [step for step, _ in tracked(printed, "train", "val_loss")]
    assert steps == [*range(1, EPOCHS + 1), EPOCHS + 1]  # the last figure is that of the model
