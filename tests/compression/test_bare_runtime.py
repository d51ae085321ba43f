"""An exported model where its runtime is all there is: the lines that README shows, in an environment of their own."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from heliostat.compression.export import save_onnx
from heliostat.compression.formats import load_model
from heliostat.compression.quantize.post_training import static

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def readme_lines(folder: Path, rows: Path, answers: Path) -> str:
    """What README tells a user to run, with a folder and rows of its own, and the outputs kept."""
    (shown,) = (block for block in BLOCK.findall((ROOT / "README.md").read_text()) if "InferenceSession" in block)
    here, count = re.subn(r'(?m)^folder = Path\(".*"\)$', f"folder = Path({str(folder)!r})", shown)
    here, more = re.subn(r"(?m)^batch = np\.zeros\(.*\)$", f"batch = np.load({str(rows)!r})", here)
    assert (count, more) == (1, 1)
    return f"{here}\nnp.save({str(answers)!r}, outputs)\n"


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has ONNX Runtime and numpy, at the versions of `constraints.txt`, and what these need."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "onnxruntime", "numpy", "-c", ROOT / "constraints.txt"]
    subprocess.run(install, check=True, env={"PATH": "/usr/bin:/bin"} | _pip_settings())
    for package in ("torch", "onnx", "heliostat"):
        assert subprocess.run([python, "-I", "-c", f"import {package}"], capture_output=True).returncode != 0
    return python


def _pip_settings() -> dict[str, str]:
    import os

    return {name: value for name, value in os.environ.items() if name.startswith("PIP_") or name == "HOME"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float", "int8"])
def test_an_onnx_model_runs_with_onnxruntime_and_numpy_alone(tmp_path, nets, images, bare_python, kind):
    folder = tmp_path / "float"
    save_onnx(nets.ConvNet(), folder, example=images)
    if kind == "int8":
        static(folder, folder := tmp_path / "int8", calibration=[images])
    np.save(tmp_path / "rows.npy", images.numpy())
    script = readme_lines(folder, tmp_path / "rows.npy", tmp_path / "answers.npy")
    subprocess.run([bare_python, "-I", "-c", script], check=True, cwd=tmp_path)
    answers = torch.from_numpy(np.load(tmp_path / "answers.npy"))
    assert torch.allclose(answers, load_model(folder)(images), atol=1e-5)
