"""Files that are damaged, a store that cannot be written, and a disk that is full."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import heliostat as public
from heliostat.errors import ArtifactError
from heliostat.tracking.replay import replay
from heliostat.tracking.tracker import Tracker


def node(copy, stage: str) -> Path:
    """The folder of a stage's only node."""
    (folder,) = (copy.store / "toy" / stage).iterdir()
    return folder


def cut(path: Path) -> None:
    """Leave the first half of a file."""
    os.truncate(path, path.stat().st_size // 2)


def to_run(heliostat, file):
    nodes = json.loads(heliostat("plan", file, "--json").stdout)["nodes"]
    return {node["name"]: node["reason"] for node in nodes if node["status"] == "run"}


def test_a_record_that_was_cut_short_is_named_with_what_to_do(copy, heliostat):
    cut(node(copy, "onnx") / "record.json")
    for command in ("plan", "run"):
        done = heliostat(command, copy.file)
        assert done.returncode == 1
        assert f"error: {node(copy, 'onnx') / 'record.json'} is damaged" in done.stderr
        assert "delete that folder and run again" in done.stderr
        assert "Traceback" not in done.stderr
    shutil.rmtree(node(copy, "onnx"))
    assert to_run(heliostat, copy.file) == {"onnx": "first run"}


@pytest.mark.slow
def test_a_model_that_was_cut_short_is_made_again(copy, heliostat):
    cut(node(copy, "onnx") / "model.onnx")
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        public.load_model(node(copy, "onnx"))
    assert to_run(heliostat, copy.file) == {"onnx": "files of the artifact are missing or cut short"}
    done = heliostat("run", copy.file, "--json")
    assert done.returncode == 0, done.stderr
    assert [node["name"] for node in json.loads(done.stdout)["nodes"] if node["status"] == "ran"] == ["onnx"]
    public.load_model(node(copy, "onnx"))


def test_one_flipped_byte_is_told_by_plan_and_not_loaded(copy, heliostat):
    weights = node(copy, "train") / "weights.pt"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert to_run(heliostat, copy.file) == {"train": "files of the artifact are damaged: weights.pt"}
    with pytest.raises(ArtifactError, match=r"weights\.pt is damaged"):
        public.load_model(node(copy, "train"), trust_code=True)


def test_weights_that_were_changed_are_refused(copy):
    weights = node(copy, "train") / "weights.pt"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    weights.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"weights\.pt is damaged"):
        public.load_model(node(copy, "train"), trust_code=True)


# --- a disk of its own -------------------------------------------------------------------------------


DISK_MIB = 8


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system. Only root may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", folder], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_store_that_cannot_be_written_is_refused_before_anything_starts(toy, disk, heliostat):
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    done = heliostat("run", toy.file, "--set", f"storage={disk / 'store'}")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: storage: the disk of {disk} is read-only")
    assert "Traceback" not in done.stderr


def test_events_that_neither_the_store_nor_the_spool_takes_are_lost_and_counted(disk):
    (disk / "filler").write_bytes(bytes(DISK_MIB * 2**20 - 4096))
    tracking = Tracker(f"sqlite:///{disk}/mlflow.db", experiment="digits", spool=disk / "spool")
    tracking.start_run("p", name="mnist")
    for step in range(100):
        tracking.metrics("p", {"loss": 1.0}, step=step)
    waiting = tracking.close()
    assert waiting + tracking.lost == 101
    assert tracking.lost > 0
    assert replay(disk / "spool").waiting == waiting


@pytest.mark.slow
def test_a_full_disk_fails_the_run_with_its_reason(toy, disk, heliostat):
    document = toy.document
    document["stages"] = [{"name": "train", "uses": "train", "config": {"epochs": 1}}]
    toy.write(document)
    (disk / "filler").write_bytes(bytes(DISK_MIB * 2**20 - 10 * 4096))
    done = heliostat("run", toy.file, "--set", f"storage={disk / 'store'}")
    assert done.returncode == 1, done.stderr
    assert "train: failed: OSError: [Errno 28] No space left on device" in done.stderr
    assert "tracking events are lost: neither sqlite:///" in done.stderr
    assert "Traceback" not in done.stderr
    (disk / "filler").unlink()
    again = heliostat("run", toy.file, "--set", f"storage={disk / 'store'}")
    assert again.returncode == 0, again.stderr
