"""The formats that an extra brings, in an environment to which it was added."""

import os
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OTHER = {"litert": "executorch", "executorch": "litert_torch"}
"""The package that the other extra brings, whose tests are skipped."""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("extra", "format"), [("litert", "tflite"), ("executorch", "pte")])
def test_what_an_extra_asks_for_exports_quantizes_and_runs_its_format(tmp_path, extra, format):
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    site_packages = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    (site_packages / "beneath.pth").write_text(sysconfig.get_path("purelib") + "\n")
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"][extra]
    subprocess.run([python, "-m", "pip", "install", "-q", *wanted], check=True)
    quantizing = "test_litert.py" if extra == "litert" else "test_pt2e.py"
    tests = ["compression/test_programs.py", f"compression/quantize/{quantizing}", "stages/test_formats.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/{name}" for name in tests)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "is not installed" not in done.stdout.replace(f"{OTHER[extra]} is not installed", "")
