"""Where a run comes from: the code's git commit, the versions of the libraries, the user. Nothing heavy is imported."""

import getpass
import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version

LIBRARIES = (
    *("heliostat", "ray", "torch", "hyperopt", "mlflow", "onnx", "onnxruntime", "torch-pruning", "numpy"),
    *("torchao", "executorch", "ai-edge-litert"),
)
NEEDED_BY_A_MODEL = ("heliostat", "mlflow", "torch", "onnxruntime", "numpy")
NEEDED_BY_A_FORMAT = {"pte": "executorch", "tflite": "ai-edge-litert"}
"""The runtime of a format, beside those."""


def git_commit(folder: Path) -> str | None:
    """The commit that `folder` is checked out at, with `-dirty` where it has changed since; None outside git."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return f"{commit}-dirty" if _git(folder, "status", "--porcelain", "--", ".") else commit
    except (subprocess.CalledProcessError, FileNotFoundError):  # no repository, no commit yet, no git
        return None


def library_versions() -> dict[str, str]:
    """The version of Python, and of each library that counts and is installed."""
    versions = {"python": python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def requirements(model_folder: Path) -> list[str]:
    """What `pip` needs to run a model as it runs here; `2.13.0+cpu` is no version that an index has, `2.13.0` is."""
    versions, needed = library_versions(), list(NEEDED_BY_A_MODEL)
    file = model_folder / "model.json"
    if file.exists():  # an own stage may write a model in its own way
        described = json.loads(file.read_text(encoding="utf-8"))
        needed += [package for name, package in NEEDED_BY_A_FORMAT.items() if name == described["format"]]
        needed += ["torchao"] if (described["quantization"] or {}).get("backend") == "torchao" else []
    return [f"{name}=={versions[name].partition('+')[0]}" for name in needed if name in versions]


def source_tags() -> dict[str, str]:
    """Who runs what, as MLflow's pages show it in their columns. The tracker gives them to every run."""
    return {"mlflow.user": _user(), "mlflow.source.name": Path(sys.argv[0]).name, "mlflow.source.type": "LOCAL"}


def code_tags(folder: Path) -> dict[str, str]:
    """The git commit of the code in `folder`, and the versions of the libraries that it runs with."""
    commit = git_commit(folder)
    return {
        **({"mlflow.source.git.commit": commit} if commit else {}),
        **{f"version.{name}": number for name, number in library_versions().items()},
    }


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user often has no name
        return str(os.getuid())


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
