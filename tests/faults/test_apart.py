"""Machines that share no folder, and a bucket as storage: files go by way of it, and outlive a machine."""

import io
import json
import signal
import subprocess
from pathlib import Path

import pytest
import torch

SEAT = {"custom_resources": {"seat": 1}}
"""Which the machine of the driver does not have."""
SLOW = """

import time
from pathlib import Path

quick_accuracy, folder = accuracy, Path({folder!r})


def accuracy(outputs, targets):
    time.sleep(0 if (folder / "hurry").exists() else 0.5)
    return quick_accuracy(outputs, targets)
"""


class Apart:
    """The toy's pipeline on a Ray whose nodes with seats see nothing of its store, and what is in the bucket of it."""

    def __init__(self, toy, command, nodes, s3, eventually) -> None:
        toy.module.write_text(toy.module.read_text() + SLOW.format(folder=str(toy.folder)))
        self.toy, self.nodes = toy, nodes
        self._command, self._s3, self._eventually = command, s3, eventually
        self._process = None

    def add(self) -> str:
        return self.nodes.add_apart(self.toy.folder / ".heliostat")

    def start(self, *stages) -> None:
        self.toy.write({**self.toy.document, "stages": list(stages), "storage": "s3://models/team"})
        self.go_on()

    def go_on(self) -> None:
        self._process = subprocess.Popen(
            [*self._command, "run", str(self.toy.file), "--address", self.nodes.address, "--json"],
            env=self.nodes.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def refused(self, *arguments: str) -> str:
        """Why the run is not even begun."""
        command = [*self._command, "run", str(self.toy.file), "--address", self.nodes.address, *arguments]
        done = subprocess.run(command, env=self.nodes.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert "search: starts" not in done.stderr
        return done.stderr

    def kill_driver(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.communicate()

    def end(self) -> None:
        if self._process and self._process.poll() is None:
            self.kill_driver()

    def finish(self) -> dict:
        """Let it end soon; its nodes by name."""
        (self.toy.folder / "hurry").touch()
        printed, said = self._process.communicate(timeout=400)
        assert self._process.returncode == 0, said
        return {node["name"]: node for node in json.loads(printed)["nodes"]}

    def checkpoints(self) -> dict[int, str]:
        """Where those are that are whole, by their epochs."""
        objects = self._s3.objects()
        files = [key for key in objects if "/epoch-" in key and key.endswith(".pt") and "plain" not in key]
        folders = [key.removesuffix(".metadata") + "plain.pt" for key in objects if key.endswith("/.metadata")]
        return {int(key.partition("/epoch-")[2][:5]): key for key in [*files, *folders]}

    def waits_for(self, epoch: int) -> list[dict[str, float]]:
        """Until a checkpoint of that epoch, or of a later one, has arrived; the epochs that it tells of."""
        over = lambda: self._process.poll() is not None  # noqa: E731
        self._eventually(lambda: max(self.checkpoints(), default=0) >= epoch, f"epoch {epoch}", unless=over)
        key = max(self.checkpoints().items())[1]
        content = self._s3.client.get_object(Bucket="models", Key=key)["Body"].read()
        return torch.load(io.BytesIO(content), weights_only=True)["progress"]["history"]


@pytest.fixture
def apart(toy, heliostat, s3, cluster_of_nodes, tmp_path, eventually):
    """The driver's machine, and two others."""
    folder = tmp_path / "nodes"
    folder.mkdir()
    nodes = cluster_of_nodes(folder)
    apart = Apart(toy, heliostat.command, nodes, s3, eventually)
    apart.first, apart.second = apart.add(), apart.add()
    yield apart
    apart.end()
    nodes.end()


def details(node) -> dict:
    return json.loads((Path(node["path"]) / "record.json").read_text())["details"]


@pytest.mark.slow
def test_a_run_whose_machines_have_neither_folder_nor_bucket_in_common_is_refused_before_anything_starts(apart):
    store = apart.toy.folder / ".heliostat"
    assert f"error: storage: 2 of 3 nodes do not see this machine's {store}" in apart.refused()
    apart.nodes.add_apart(store, AWS_ENDPOINT_URL="http://127.0.0.1:9")
    said = apart.refused("--set", "storage=s3://models/team")
    assert "cannot use the bucket instead: storage: s3://models/team: " in said


@pytest.mark.slow
def test_a_pipeline_runs_on_machines_that_share_no_folder(apart):
    apart.start(
        {
            "name": "search",
            "uses": "tune",
            "config": {
                "trials": 3,
                "space": {"optimizer.lr": {"loguniform": [0.001, 0.1]}},
                "train": {"epochs": 1},
                "evaluate_after": [{"quantize": {"method": "static"}}],
            },
            "resources": SEAT,
        },
        {
            "name": "train",
            "uses": "train",
            "inputs": {"params": "search"},
            "config": {"epochs": 2, "strategy": "ddp"},
            "resources": {**SEAT, "workers": 2},
        },
        {"name": "alone", "uses": "train", "config": {"epochs": 2}, "resources": SEAT},
        {
            "name": "prune",
            "uses": "prune",
            "inputs": {"model": "train"},
            "config": {"sparsity": 0.5, "finetune_epochs": 1},
            "resources": SEAT,
        },
        {
            "name": "int8",
            "uses": "quantize",
            "inputs": {"model": "prune"},
            "config": {"method": "static"},
            "resources": SEAT,
        },
        {
            "name": "best",
            "uses": "select",
            "inputs": {"baseline": "train", "candidates": ["train", "alone", "prune", "int8"]},
            "resources": SEAT,
        },
    )
    nodes = apart.finish()
    assert {node["status"] for node in nodes.values()} == {"ran"}
    for node in nodes.values():
        folder = Path(node["path"])
        record = json.loads((folder / "record.json").read_text())
        assert {path.name for path in folder.iterdir()} >= {name.partition("/")[0] for name in record["files"]}
    kept = {key.rpartition("/")[2] for key in apart._s3.objects()}
    assert not [name for name in kept if name.startswith(("epoch-", ".outpost", "__"))]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_training_whose_machine_was_lost_goes_on_on_another_and_so_does_one_whose_driver_was(apart, strategy):
    config = {"epochs": 60, "strategy": strategy}
    apart.start({"name": "train", "uses": "train", "config": config, "resources": {**SEAT, "workers": 2}, "retries": 1})
    apart.waits_for(2)
    third = apart.add()
    apart.nodes.kill_apart(apart.first)
    at_kill = apart.waits_for(2)
    again = apart.waits_for(len(at_kill) + 2)
    assert again[: len(at_kill)] == at_kill  # to the microsecond of each epoch's duration

    apart.kill_driver()
    at_kill = apart.waits_for(1)
    assert third
    apart.go_on()
    history = details(apart.finish()["train"])["history"]
    assert history[: len(at_kill)] == at_kill
    assert len(history) == 60


@pytest.mark.slow
def test_a_task_whose_machine_was_lost_goes_on_on_another(apart):
    apart.start(
        {"name": "train", "uses": "train", "config": {"epochs": 1}, "resources": SEAT},
        {
            "name": "prune",
            "uses": "prune",
            "inputs": {"model": "train"},
            "config": {"sparsity": 0.5, "finetune_epochs": 60},
            "resources": SEAT,
            "retries": 1,
        },
    )
    apart.waits_for(4)
    apart.nodes.kill_apart(apart.first)
    apart.nodes.kill_apart(apart.second)
    at_kill = apart.waits_for(4)
    apart.add()
    history = details(apart.finish()["prune"])["history"]
    assert history[: len(at_kill)] == at_kill
    assert len(history) == 60
