"""What a process that works alone is ended for, and what not."""

import subprocess
import sys

import pytest

from heliostat.runtime.hang import where_it_hung

WAITS_FOR_A_CHILD = """
import subprocess, sys
from contextlib import nullcontext
from pathlib import Path

import ray  # as in any process that is watched

from heliostat.runtime.hang import ended_if_it_hangs, waiting

note, code, says_so = sys.argv[1:]
with ended_if_it_hangs(1, note=Path(note)), waiting() if says_so == "True" else nullcontext():
    subprocess.run([sys.executable, "-c", code])
"""
COMPUTES = "import time; until = time.monotonic() + 3\nwhile time.monotonic() < until: pass"
SLEEPS = "import time; time.sleep(3.5)"


@pytest.mark.parametrize(
    ("code", "says_so", "hangs"),
    [(COMPUTES, False, False), (SLEEPS, False, True), (SLEEPS, True, False)],
    ids=["for one that computes", "for one that does nothing", "and says so"],
)
def test_a_process_may_wait_for_another(tmp_path, code, says_so, hangs):
    note = tmp_path / "note"
    command = [sys.executable, "-c", WAITS_FOR_A_CHILD, str(note), code, str(says_so)]
    assert subprocess.run(command, check=False).returncode == hangs
    assert ("subprocess.py" in (where_it_hung(note) or "")) == hangs
