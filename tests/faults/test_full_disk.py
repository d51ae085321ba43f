"""A store on a disk that fills up: every part of a run says so, and the same command resumes once there is room."""

import json
import subprocess

import pytest


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own, and a function that changes the disk's size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: str, *options: str) -> int:
        command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True, check=False).returncode

    if mount("3000k") != 0:
        pytest.skip("only root may mount a disk")
    yield folder, lambda size: mount(size, "remount")
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_named_with_the_command_to_run_and_that_command_finishes_the_run(toy, heliostat, small_disk):
    folder, resize = small_disk
    document = toy.document
    wide = {"epochs": 2, "model_args": {"width": 400}}
    document["stages"] = [{"name": "train", "uses": "train", "config": wide}]
    toy.write(document)
    arguments = ["run", "toy.yaml", "--set", f"storage={folder}/store"]

    failed = heliostat(*arguments, cwd=toy.folder)
    again = f"heliostat run toy.yaml --set storage={folder}/store"
    assert failed.returncode == 1, failed.stderr
    assert f"train failed: the disk of {folder}/store/toy/train/" in failed.stdout
    assert f"is full (0.0 MB free); free some and run again: {again}" in failed.stdout
    assert f"is full (0.0 MB free); free some. To send them later: heliostat sync --storage {folder}" in failed.stderr
    for output in (failed.stdout, failed.stderr):
        assert "Traceback" not in output
        assert "inline_container" not in output

    assert resize("100m") == 0
    done = heliostat(*arguments, "--json", cwd=toy.folder)
    assert done.returncode == 0, done.stderr
    assert [node["status"] for node in json.loads(done.stdout)["nodes"]] == ["ran"]
    assert not list((folder / "store" / "spool").glob("*.jsonl"))
