"""On a Ray that somebody else started: `ray start --head`, and a second node that joined it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

RAY = str(Path(sys.executable).parent / "ray")


@dataclass(frozen=True)
class Cluster:
    address: str
    dashboard: str
    environment: dict[str, str]
    """Of a user of the cluster, whose home has the token."""

    def heliostat(self, *arguments: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "heliostat.cli", *map(str, arguments)]
        environment = {**self.environment, **variables}
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500, check=False
        )


@pytest.fixture(scope="module")
def start(eventually, processes_with):
    """Starts a cluster with nodes of so many CPUs, a token, ports and a home of its own, for as long as the context."""

    @contextmanager
    def start(*num_cpus: int):
        home = Path(tempfile.mkdtemp(prefix="rs", dir="/tmp"))  # a Unix socket's path has 107 characters at most
        gcs, dashboard, client, *agents = free_ports(3 + len(num_cpus))
        kept = {"RAY_worker_niceness"}
        environment = {n: value for n, value in os.environ.items() if not n.startswith("RAY_") or n in kept}
        environment |= {"HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
        starter = {**environment, "RAY_AUTH_MODE": "token"}
        subprocess.run([RAY, "get-auth-token", "--generate"], env=starter, check=True, capture_output=True)
        head = f"--head --port {gcs} --dashboard-port {dashboard} --ray-client-server-port {client} --temp-dir {home}/t"
        started = []

        def start_node(arguments: str, cpus: int, agent: int) -> None:
            command = f"{RAY} start {arguments} --block --num-cpus {cpus} --dashboard-agent-listen-port {agent}"
            with open(home / "log", "ab") as log:
                started.append(
                    subprocess.Popen(command.split(), env=starter, stdout=log, stderr=log, start_new_session=True)
                )

        def fell_over() -> bool:
            return any(process.poll() is not None for process in started)

        try:
            start_node(head, num_cpus[0], agents[0])
            eventually(lambda: answers(f"http://127.0.0.1:{dashboard}/api/version"), "no dashboard", unless=fell_over)
            for cpus, agent in zip(num_cpus[1:], agents[1:], strict=True):
                start_node(f"--address 127.0.0.1:{gcs}", cpus, agent)
            wait = [sys.executable, "-c", WAIT_FOR_NODES, f"127.0.0.1:{gcs}", str(len(num_cpus))]
            found = subprocess.run(wait, env=starter, capture_output=True, text=True, timeout=300, check=False)
            assert found.returncode == 0, found.stderr + (home / "log").read_text()
            yield Cluster(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", environment)
        finally:
            for process in started:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            for pid in processes_with(f"HOME={home}"):
                os.kill(pid, signal.SIGKILL)
            shutil.rmtree(home, ignore_errors=True)

    return start


@pytest.fixture(scope="module")
def two_nodes(start):
    with start(1, 1) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def one_node(start):
    """For jobs. Two nodes of one machine share the folder of a job's files, and when the second one needs them too, it
    puts them there anew: under the job, whose working directory is gone.
    """
    with start(2) as cluster:
        yield cluster


WAIT_FOR_NODES = """
import sys, time
import ray
ray.init(address=sys.argv[1], log_to_driver=False)
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[2]):
    time.sleep(0.5)
"""


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2)
    except urllib.error.HTTPError:
        return True  # it wants the token
    except OSError:
        return False
    return True


@pytest.fixture
def small(toy):
    """A training by two workers, and its quantized model."""
    document = toy.document
    document["stages"] = [
        {"name": "train", "uses": "train", "config": {"epochs": 2}, "resources": {"workers": 2}},
        {"name": "int8", "uses": "quantize", "inputs": {"model": "train"}},
    ]
    toy.write(document)
    return toy


def test_a_run_uses_both_nodes_of_a_ray_that_was_started_before(two_nodes, small):
    done = two_nodes.heliostat(
        "run", small.file, "--address", "auto", "--json", cwd=small.folder, RAY_ADDRESS=two_nodes.address
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    # Each node has one CPU, so the two workers were on both.
    assert {node["name"]: node["status"] for node in document["nodes"]} == {"train": "ran", "int8": "ran"}
    too_many = [
        "run",
        small.file,
        "--address",
        two_nodes.address,
        "--set",
        "stages.train.resources.workers=3",
        "--force",
        "train",
    ]
    refused = two_nodes.heliostat(*too_many, cwd=small.folder)
    assert refused.returncode == 3, refused.stderr
    assert "train: needs 3 CPUs at once" in refused.stderr
    assert f"the cluster at {two_nodes.address} has 2 CPUs on 2 nodes" in refused.stderr


@pytest.mark.slow
def test_a_submitted_pipeline_streams_its_output(one_node, small):
    done = one_node.heliostat("submit", small.file, "--address", one_node.dashboard, cwd=small.folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "train: done in" in done.stdout
    assert "int8: done in" in done.stdout
    store = Path(one_node.environment["HOME"]) / "heliostat" / "toy"
    assert len(list(store.glob("toy/*/*/record.json"))) == 2
    assert not (small.folder / ".heliostat").exists()


@pytest.mark.slow
def test_a_job_that_fails_ends_with_its_exit_code(one_node, small):
    small.module.write_text(
        small.module.read_text().replace("def build_data(seed=0):", "def build_data(seed=0):\n    1 / 0")
    )
    done = one_node.heliostat("submit", small.file, "--address", one_node.dashboard, cwd=small.folder)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "ZeroDivisionError" in done.stdout
