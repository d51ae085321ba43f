"""What a run shows of itself to other machines and to other users of this one."""

import ipaddress
import os
import re
import stat
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

PRIVATE = stat.S_IRWXG | stat.S_IRWXO


@dataclass(frozen=True)
class Watched:
    """A finished run, and what was seen of its processes while it worked."""

    listening: set[tuple[str, str]]
    """Each address at which a process of the run listened for connections, with the name of that process."""
    session: dict[Path, int]
    """The folders of its Ray in `/tmp`, with their modes."""
    token: Path


@pytest.fixture(scope="module")
def watched(tmp_path_factory, toy_in, heliostat_in, processes_with) -> Watched:
    """A training of two workers, in a home that has no token of Ray yet."""
    home = tmp_path_factory.mktemp("home")
    toy = toy_in(tmp_path_factory.mktemp("watched") / "toy")
    document = toy.document
    document["stages"] = [{"name": "train", "uses": "train", "config": {"epochs": 1}, "resources": {"workers": 2}}]
    mark = f"WATCHED={home}"
    command = heliostat_in(toy.folder)
    environment = {**command.environment, "HOME": str(home), "WATCHED": str(home)}
    line = [*command.command, "run", str(toy.write(document))]
    listening, sessions = set(), {}
    with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        while run.poll() is None:
            pids = processes_with(mark)
            listening |= _listening(pids)
            sessions |= {folder: folder.stat().st_mode for folder in _sessions_of(pids)}
            time.sleep(0.1)
        assert run.returncode == 0, run.stdout.read()
    return Watched(listening, sessions, home / ".ray" / "auth_token")


def _listening(pids: list[int]) -> set[tuple[str, str]]:
    """The addresses at which these processes listen by TCP, or receive by UDP, by Linux's /proc."""
    owners = {}
    for pid in pids:
        try:
            links = [os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()]
            name = Path(Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0]).name
        except OSError:
            continue  # it ended meanwhile
        owners |= {link.removeprefix("socket:[").rstrip("]"): name for link in links if link.startswith("socket:")}
    found = set()
    for table, state in (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == state and fields[9] in owners:
                found.add((_address(fields[1].partition(":")[0]), owners[fields[9]]))
    return found


def _address(digits: str) -> str:
    """`0100007F` is 127.0.0.1: each word of 32 bits is the kernel's own, little end first."""
    found = ipaddress.ip_address(b"".join(bytes.fromhex(word)[::-1] for word in re.findall("." * 8, digits)))
    return str(getattr(found, "ipv4_mapped", None) or found)


def _sessions_of(pids: list[int]) -> set[Path]:
    commands = []
    for pid in pids:
        try:
            commands.append(Path(f"/proc/{pid}/cmdline").read_text())
        except OSError:
            continue
    return {Path(name) for command in commands for name in re.findall(r"/tmp/heliostat-\w+", command)}


def test_no_process_of_a_run_listens_beyond_this_machine(watched):
    for expected in ("gcs_server", "raylet", "TrainWorker"):
        assert any(expected in process for _, process in watched.listening)
    assert {seen for seen in watched.listening if not ipaddress.ip_address(seen[0]).is_loopback} == set()


def test_no_other_user_can_read_the_session_of_a_run_or_the_token_that_it_made(watched):
    assert watched.session
    assert all(not mode & PRIVATE for mode in watched.session.values())
    assert not watched.token.stat().st_mode & PRIVATE
    assert re.fullmatch("[0-9a-f]{64}", watched.token.read_text())


def test_nothing_of_the_session_is_left_after_a_run(watched):
    assert not any(folder.exists() for folder in watched.session)
