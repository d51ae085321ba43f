"""The gate that keeps a node quiet: with threads and processes that really contend for it."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from heliostat.runtime.gate import Gate

HOLD = """
import sys, time
from pathlib import Path
from heliostat.runtime.gate import Gate
gate = Gate(Path(sys.argv[1]))
with gate.at_work():
    if sys.argv[2] == "alone":
        with gate.alone():
            print("inside", flush=True)
            time.sleep(600)
    print("inside", flush=True)
    time.sleep(600)
"""


class Worker:
    """A thread that is at work, and counts the steps between which it gives way."""

    def __init__(self, folder: Path) -> None:
        self.steps, self.stop = 0, False
        self._gate = Gate(folder)
        self.thread = threading.Thread(target=self._work)
        self.thread.start()

    def has_made(self, steps: int) -> bool:
        return self.steps >= steps

    def _work(self) -> None:
        with self._gate.at_work():
            while not self.stop:
                self.steps += 1
                self._gate.give_way()


@contextmanager
def working(folder: Path, count: int) -> Iterator[list[Worker]]:
    workers = [Worker(folder) for _ in range(count)]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.stop = True
        for worker in workers:
            worker.thread.join()


@contextmanager
def holder(folder: Path, how: str) -> Iterator["subprocess.Popen[str]"]:
    """Another process that is at work or alone, and does not give way."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, folder, how], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "inside\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_who_is_alone_sees_no_step_of_others_who_then_go_on(tmp_path, eventually):
    gate = Gate(tmp_path)
    with working(tmp_path, 3) as workers, gate.at_work():
        for _ in range(5):
            with gate.alone():
                goals = [worker.steps + 1 for worker in workers]
                time.sleep(0.02)
                assert [worker.steps + 1 for worker in workers] == goals
            for worker, goal in zip(workers, goals):
                eventually(partial(worker.has_made, goal), "it goes on", timeout_s=30)


def test_only_one_is_alone_at_a_time(tmp_path):
    inside: list[int] = []
    most: list[int] = []

    def measure() -> None:
        gate = Gate(tmp_path)
        with gate.at_work():
            for _ in range(10):
                with gate.alone():
                    inside.append(1)
                    most.append(len(inside))
                    time.sleep(0.001)
                    inside.pop()

    threads = [threading.Thread(target=measure) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 40


def test_a_measurement_waits_for_the_step_under_way(tmp_path):
    entered = threading.Event()
    mine, other = Gate(tmp_path), Gate(tmp_path)

    def measure() -> None:
        with other.at_work(), other.alone():
            entered.set()

    with mine.at_work():
        thread = threading.Thread(target=measure)
        thread.start()
        assert not entered.wait(0.1)
        mine.give_way()
        assert entered.is_set()
    thread.join()


def test_who_rests_holds_nobody_up(tmp_path):
    resting, other = Gate(tmp_path), Gate(tmp_path)
    with resting.at_work(), resting.at_rest(), other.at_work(), other.alone():
        pass


@pytest.mark.parametrize("how", ["at work", "alone"])
def test_a_process_that_is_killed_holds_nobody_up(tmp_path, how):
    gate = Gate(tmp_path)
    with holder(tmp_path, how) as process:
        os.kill(process.pid, signal.SIGKILL)
        with gate.at_work(), gate.alone():
            pass
