"""Files that are damaged, a store that cannot be written, and a disk that is full."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import heliostat as public
from heliostat.errors import ArtifactError


@pytest.fixture(scope="module")
def original(tmp_path_factory, toy_in, heliostat_in):
    """A finished run of three nodes."""
    toy = toy_in(tmp_path_factory.mktemp("files") / "toy")
    document = toy.document
    document["stages"] = [
        {"name": "train", "uses": "train", "config": {"epochs": 2}},
        {"name": "onnx", "uses": "export", "inputs": {"model": "train"}},
        {"name": "best", "uses": "select", "inputs": {"baseline": "train", "candidates": "onnx"}},
    ]
    document["stages"][-1]["config"] = {"max_drop": {"val_accuracy": 0.1}}
    toy.write(document)
    done = heliostat_in(toy.folder)("run", "toy.yaml", timeout=500)
    assert done.returncode == 0, done.stderr
    return toy


@pytest.fixture
def store(original, tmp_path):
    """A copy of it: the pipeline file, and the folder of a stage's only node."""
    shutil.copytree(original.folder, tmp_path / "copy")
    folder = tmp_path / "copy" / ".heliostat" / "toy"
    return SimpleNamespace(
        file=tmp_path / "copy" / "toy.yaml",
        node=lambda stage: next(p for p in (folder / stage).iterdir() if p.is_dir()),
    )


def cut(path: Path) -> None:
    """Leave the first half of a file."""
    os.truncate(path, path.stat().st_size // 2)


def plan(heliostat, file):
    return {node["name"]: node for node in json.loads(heliostat("plan", file, "--json").stdout)["nodes"]}


def test_a_record_that_was_cut_short_is_named_with_what_to_do(store, heliostat):
    cut(store.node("onnx") / "record.json")
    for command in ("plan", "run"):
        done = heliostat(command, store.file)
        assert done.returncode == 1
        assert f"error: {store.node('onnx') / 'record.json'} is damaged" in done.stderr
        assert "delete that folder and run again" in done.stderr
        assert "Traceback" not in done.stderr
    shutil.rmtree(store.node("onnx"))
    assert {name: node["status"] for name, node in plan(heliostat, store.file).items()} == {
        "train": "reuse",
        "onnx": "run",
        "best": "reuse",
    }


def test_a_model_that_was_cut_short_is_made_again(store, heliostat):
    cut(store.node("onnx") / "model.onnx")
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        public.load_model(store.node("onnx"))
    assert plan(heliostat, store.file)["onnx"]["reason"] == "files of the artifact are missing or cut short"
    done = heliostat("run", store.file, "--json")
    assert done.returncode == 0, done.stderr
    states = {node["name"]: node["status"] for node in json.loads(done.stdout)["nodes"]}
    assert states == {"train": "reused", "onnx": "ran", "best": "reused"}
    public.load_model(store.node("onnx"))


def test_weights_that_were_changed_are_refused(store):
    weights = store.node("train") / "weights.pt"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    weights.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"weights\.pt is damaged"):
        public.load_model(store.node("train"))


# --- a disk of its own -------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB. Only root may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_store_that_cannot_be_written_is_refused_before_anything_starts(store, disk, heliostat):
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    done = heliostat("run", store.file, "--set", f"storage={disk / 'store'}")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: storage: {disk / 'store'} cannot be written: Read-only file system")
    assert "Traceback" not in done.stderr


def test_a_full_disk_fails_the_run_with_its_reason(store, disk, heliostat):
    (disk / "filler").write_bytes(bytes(2**20 - 10 * 4096))
    done = heliostat("run", store.file, "--set", f"storage={disk / 'store'}", timeout=300)
    assert done.returncode == 1, done.stderr
    assert "No space left on device" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    (disk / "filler").unlink()
