"""What a session shows and leaves behind, each in a process of its own: only one Ray fits into a process at a time."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from heliostat.errors import SpecError
from heliostat.runtime import session

SCRIPT = """
    import sys, time, warnings
    from pathlib import Path
    from heliostat.runtime import session
    folder = Path(sys.argv[1])
    sys.path.append(sys.argv[1])
    with session.start(log=folder / "ray.log", root=folder, num_cpus=2, preload=["slow"]) as live:
        import ray, slow

        @ray.remote
        def speak():
            print("a worker speaks")
            import torch
            return 1

        @ray.remote(max_retries=0)
        def die():
            import os
            os.kill(os.getpid(), 9)

        print("result", ray.get(speak.remote()))
        try:
            ray.get(die.remote())
        except ray.exceptions.WorkerCrashedError:
            pass
        print("preloaded", slow.since_before)
        print("capacity", live.capacity())
        print("to the terminal", file=sys.stderr)
        import os
        os.write(2, b"from C code\\n")
        ray.logger.warning("about ray")
        {then}
"""

SLOW = """
    import threading, time
    import ray
    while not ray.is_initialized():
        time.sleep(0.05)
    time.sleep(0.3)
    since_before = threading.current_thread() is not threading.main_thread()
"""


def start(folder: Path, then: str = "time.sleep(1.5)") -> subprocess.Popen:
    (folder / "slow.py").write_text(textwrap.dedent(SLOW))
    script = textwrap.dedent(SCRIPT).format(then=then)
    command = [sys.executable, "-c", script, str(folder)]
    environment = os.environ | {"TMPDIR": str(folder / ("a-long-name-" * 10))}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def children(pid: int) -> list[int]:
    """The processes that descend from `pid`, by Linux's /proc.

    Ray's two agents are left out: after a kill they look for the head for a minute before they give up.
    """
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        name, _, rest = stat.read_text().rpartition(")")
        parents[int(name.split()[0])] = int(rest.split()[1])
    found = [pid]
    for parent in found:
        found += [child for child, its_parent in parents.items() if its_parent == parent]
    return [child for child in found[1:] if "Agent" not in Path(f"/proc/{child}/cmdline").read_text()]


def all_gone(pids: list[int], *, within_s: float = 30) -> bool:
    deadline = time.monotonic() + within_s
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def wait_until_up(process: subprocess.Popen) -> None:
    assert process.stdout is not None
    while "capacity" not in process.stdout.readline():
        assert process.poll() is None


def test_only_the_drivers_own_words_reach_the_terminal_and_the_log_has_the_rest(tmp_path):
    process = start(tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.splitlines() == ["result 1", "preloaded True", "capacity 2 CPUs"]
    assert err.splitlines() == ["to the terminal"]
    log = (tmp_path / "ray.log").read_text()
    assert "a worker speaks" in log
    assert "from C code" in log
    assert "about ray" in log


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_nothing_of_ray_outlives_an_interrupted_or_killed_driver_and_the_next_one_starts(tmp_path, sent):
    process = start(tmp_path, then="time.sleep(600)")
    wait_until_up(process)
    started = children(process.pid)
    commands = [Path(f"/proc/{pid}/cmdline").read_text() for pid in started]
    assert any("raylet" in command for command in commands)
    assert not any("dashboard.py" in command or "autoscaler" in command for command in commands)  # nobody needs them
    time.sleep(0.5)
    process.send_signal(sent)
    process.wait(60)
    assert all_gone(started)
    again = start(tmp_path, then="pass")
    assert again.wait(120) == 0


def test_an_address_where_no_ray_answers_is_refused_at_once(tmp_path):
    with (
        pytest.raises(SpecError, match=r"--address 127\.0\.0\.1:1: no Ray answers there"),
        session.start("127.0.0.1:1", log=tmp_path / "ray.log", root=tmp_path),
    ):
        pass
