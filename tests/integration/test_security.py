"""What a run shows of itself to other machines and to other users of this one."""

import base64
import http.server
import ipaddress
import json
import os
import re
import stat
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

PRIVATE = stat.S_IRWXG | stat.S_IRWXO
SECRET, OTHER = "hunter2-f7a1", "swordfish-09c3"
ASKS_FOR_PASSWORD = f"""
def build_data(seed=0, password=None, build=build_data):
    assert password == "{OTHER[::-1]}"[::-1]  # so that the source does not have it either
    return build(seed)
"""


@dataclass(frozen=True)
class Watched:
    """A finished run, and what was seen of its processes while it worked."""

    listening: set[tuple[str, str]]
    """Each address at which a process of the run listened for connections, with the name of that process."""
    session: dict[Path, int]
    """The folders of its Ray in `/tmp`, with their modes."""
    token: Path
    store: Path
    output: str
    commands: set[str]
    """Those of its processes."""
    asked: list[str | None]
    """The credentials in each request to the tracking server."""


@pytest.fixture(scope="module")
def watched(tmp_path_factory, toy_in, heliostat_in, processes_with) -> Watched:
    """A training of two workers, in a home that has no token of Ray yet, with a server and data that take a password.

    The server answers that it is away, so that what would be sent there stays in the store.
    """
    home = tmp_path_factory.mktemp("home")
    toy = toy_in(tmp_path_factory.mktemp("watched") / "toy")
    document = toy.document
    toy.module.write_text(toy.module.read_text() + ASKS_FOR_PASSWORD)
    config = {"epochs": 1, "data_args": {"password": OTHER}}
    document["stages"] = [{"name": "train", "uses": "train", "config": config, "resources": {"workers": 2}}]
    mark = f"WATCHED={home}"
    command = heliostat_in(toy.folder)
    environment = {**command.environment, "HOME": str(home), "WATCHED": str(home)}
    server, asked = _server()
    uri = f"tracking.uri=http://user:{SECRET}@127.0.0.1:{server.server_port}"
    line = [*command.command, "run", str(toy.write(document)), "--set", uri]
    listening, sessions, commands = set(), {}, set()
    with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        while run.poll() is None:
            pids = processes_with(mark)
            commands |= {_command(pid) for pid in pids}
            listening |= _listening(pids)
            sessions |= {folder: folder.stat().st_mode for folder in _sessions_of(pids)}
            time.sleep(0.1)
        output = run.stdout.read()
    server.shutdown()
    record = toy.folder / ".heliostat" / "toy" / "train"
    assert list(record.glob("*/record.json")), output
    store = toy.folder / ".heliostat"
    return Watched(listening, sessions, home / ".ray" / "auth_token", store, output, commands, asked)


def _server() -> tuple[http.server.HTTPServer, list[str | None]]:
    """A tracking server that is away, and the credentials that it is sent."""
    asked = []

    class Away(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers["Authorization"])
            self.send_error(503)

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Away)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, asked


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


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
    return {Path(name) for pid in pids for name in re.findall(r"/tmp/heliostat-\w+", _command(pid))}


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


def test_a_password_is_used_and_neither_stored_nor_printed_nor_in_a_command(watched):
    expected = "Basic " + base64.b64encode(f"user:{SECRET}".encode()).decode()
    assert expected in watched.asked
    kept = [file for file in watched.store.rglob("*") if file.is_file()]
    assert [file for file in kept if file.parent.name == "spool"]
    for secret in (SECRET, OTHER, base64.b64encode(f"user:{SECRET}".encode()).decode()):
        assert [file for file in kept if secret.encode() in file.read_bytes()] == []
        assert secret not in watched.output
    # The first process has it in what was typed, until it begins again without.
    assert len([command for command in watched.commands if SECRET in command or OTHER in command]) <= 1
    (record,) = (json.loads(file.read_text()) for file in watched.store.glob("toy/train/*/record.json"))
    assert record["params"]["train"]["data_args"] == {"password": "hidden:train.data_args.password"}
