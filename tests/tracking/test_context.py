"""Where a run comes from."""

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


def test_versions_are_known_without_importing_what_they_are_of():
    assert library_versions()["torch"] == version("torch")
    assert any(line.startswith("torch==") and "+" not in line for line in requirements())
    script = """
import sys
from heliostat.tracking.context import library_versions
library_versions()
assert not {"torch", "ray", "mlflow"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", script], check=True)
