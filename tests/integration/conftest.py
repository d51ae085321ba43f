"""A fresh Python process, for what must work without the state of this one."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., str]:
    """Runs a script in a fresh process, from a folder of its own, and gives what it printed."""

    def run(script: str, *arguments: str | Path) -> str:
        folder = tmp_path / "fresh"
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-P", "-c", script, *map(str, arguments)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
