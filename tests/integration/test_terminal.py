"""What a person sees: a live view on a terminal, plain lines in a log, none of Ray's own talk, and a clean Ctrl-C."""

import json
import os
import pty
import re
import signal
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

import pytest

OWN_LINE = re.compile(
    r"\d\d:\d\d:\d\d (toy: \d+ nodes|what Ray says is kept in |"
    r"[\w\[\]=.]+: (starts|made|measuring|done in|warning: a large fall|epoch|\d+/\d+ trials))"
)
"""What the plain view writes: the time, and what happened to which node."""


def test_only_our_own_lines_are_on_standard_error(finished):
    lines = finished.process.stderr.splitlines()
    assert lines
    assert [line for line in lines if not OWN_LINE.match(line)] == []


def test_what_ray_says_is_in_the_log_that_the_output_names(finished):
    (named,) = re.findall(r"what Ray says is kept in (.+)", finished.process.stderr)
    assert Path(named) == Path(finished.document["log"])
    assert Path(named).parent == finished.store / "logs"
    assert "ray" in Path(named).read_text().lower()


class Terminal:
    """A command on a pseudo-terminal, in a session of its own. `text` is all that it has shown so far."""

    def __init__(self, command, *, cwd, environment):
        master, slave = pty.openpty()
        self.process = subprocess.Popen(
            command, cwd=cwd, env=environment, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
        )
        os.close(slave)
        self._shown = bytearray()
        self._reader = threading.Thread(target=self._read, args=(master,), daemon=True)
        self._reader.start()

    def _read(self, master):
        with suppress(OSError):  # the other end is closed: Linux answers EIO
            while chunk := os.read(master, 65536):
                self._shown += chunk
        os.close(master)

    @property
    def text(self):
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self._shown.decode(errors="replace")).replace("\r", "")

    def interrupt(self):
        """What Ctrl-C does: a signal to everything in the terminal's foreground."""
        os.killpg(self.process.pid, signal.SIGINT)

    def wait(self, timeout):
        code = self.process.wait(timeout)
        self._reader.join(10)
        return code


SLOW = """

import os
import time

fast_accuracy = accuracy


def accuracy(outputs, targets):
    time.sleep(float(os.environ.get("TOY_SLEEP_S", "0")))
    return fast_accuracy(outputs, targets)
"""


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, toy_in, heliostat_in, eventually):
    """A run on a terminal that is interrupted in its search: the toy, the terminal, its exit code and the journal."""
    toy = toy_in(tmp_path_factory.mktemp("terminal") / "toy")
    toy.module.write_text(toy.module.read_text() + SLOW)
    document = toy.document
    document["stages"] = [
        *document["stages"][:2],
        {"name": "int8", "uses": "quantize", "inputs": {"model": "train"}},
        {"name": "best", "uses": "select", "inputs": {"baseline": "train", "candidates": "int8"}},
    ]
    document["stages"][-1]["config"] = {"max_drop": {"val_accuracy": 0.2}}
    toy.write(document)
    cli = heliostat_in(toy.folder)
    environment = {**cli.environment, "TERM": "xterm-256color", "TOY_SLEEP_S": "2", "TOY_MARK": str(toy.folder)}
    terminal = Terminal([*cli.command, "run", "toy.yaml", "--set", "seed=0"], cwd=toy.folder, environment=environment)

    def journal():
        return "".join(path.read_text() for path in toy.folder.glob(".heliostat/toy/search/*/journal.jsonl"))

    try:
        over = lambda: terminal.process.poll() is not None  # noqa: E731
        eventually(lambda: '"ended"' in journal(), "no trial has ended", unless=over)
        terminal.interrupt()
        code = terminal.wait(120)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(terminal.process.pid, signal.SIGKILL)
    return toy, terminal, code, journal()


def test_the_live_view_shows_every_node_and_how_far_it_is(interrupted):
    _, terminal, _, _ = interrupted
    for node in ("search", "train", "int8", "best"):
        assert re.search(rf"^\W+{node}\b", terminal.text, re.MULTILINE), terminal.text
    assert re.search(r"search .*\d/4 trials", terminal.text)
    assert "waits" in terminal.text


def test_ctrl_c_says_what_is_kept_and_how_to_go_on(interrupted):
    _, terminal, code, _ = interrupted
    assert code == 130, terminal.text
    assert "interrupted: 0 of 4 nodes are done and kept, and so are finished trials" in terminal.text
    assert "resume with: heliostat run toy.yaml --set seed=0" in terminal.text
    assert "Traceback" not in terminal.text


def test_ctrl_c_leaves_no_process_behind(interrupted, processes_with, eventually):
    toy, _, _, _ = interrupted
    eventually(lambda: not processes_with(f"TOY_MARK={toy.folder}"), "processes are left", timeout_s=30)


def test_the_same_command_goes_on_and_ends_with_the_table(interrupted, heliostat_in):
    toy, _, _, before = interrupted
    cli = heliostat_in(toy.folder)
    ended = {event["id"] for event in events(before) if event["event"] == "ended"}
    done = cli("run", "toy.yaml", timeout=500)
    assert done.returncode == 0, done.stderr
    (journal,) = toy.folder.glob(".heliostat/toy/search/*/journal.jsonl")
    after = events(journal.read_text())
    assert sorted(e["id"] for e in after if e["event"] == "ended") == ["0001", "0002", "0003", "0004"]
    assert ended
    assert not ended & {e["id"] for e in after if e["event"] == "restarted"}
    again = cli("run", "toy.yaml")
    assert again.stdout == done.stdout
    for shown in ("val accuracy", "MB", "params", "p50 ms", "speed-up", "why", "next: heliostat ui"):
        assert shown in done.stdout


def events(text):
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
