"""Where a run comes from."""

import json
import subprocess
import sys
from importlib.metadata import version

from heliostat.tracking.context import code_tags, git_commit, library_versions, requirements


def git(folder, *arguments):
    identity = ("-c", "user.name=Ada", "-c", "user.email=ada@example.org")
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_a_commit_is_named_and_marked_when_the_folder_has_changed_since(tmp_path):
    assert git_commit(tmp_path) is None
    assert "mlflow.source.git.commit" not in code_tags(tmp_path)
    git(tmp_path, "init")
    assert git_commit(tmp_path) is None
    (tmp_path / "mnist.py").write_text("")
    git(tmp_path, "add", "mnist.py")
    git(tmp_path, "commit", "--message", "first")
    commit = git_commit(tmp_path)
    assert len(commit) == 40
    (tmp_path / "mnist.py").write_text("changed = True")
    assert git_commit(tmp_path) == f"{commit}-dirty"


def test_a_model_needs_its_runtime(tmp_path, monkeypatch):
    monkeypatch.setattr("heliostat.tracking.context.version", lambda name: "1.2")
    for described, needed in (
        ({"format": "tflite", "quantization": {"backend": "litert"}}, "ai-edge-litert==1.2"),
        ({"format": "pte", "quantization": None}, "executorch==1.2"),
        ({"format": "pt2", "quantization": {"backend": "torchao"}}, "torchao==1.2"),
    ):
        (tmp_path / "model.json").write_text(json.dumps(described))
        assert [line for line in requirements(tmp_path) if line not in requirements(tmp_path / "none")] == [needed]


def test_versions_are_known_without_importing_what_they_are_of(tmp_path):
    assert library_versions()["torch"] == version("torch")
    assert any(line.startswith("torch==") and "+" not in line for line in requirements(tmp_path))
    script = """
import sys
from heliostat.tracking.context import library_versions
library_versions()
assert not {"torch", "ray", "mlflow"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", script], check=True)
