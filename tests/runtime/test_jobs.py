import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import pytest

from heliostat.errors import SpecError
from heliostat.runtime import auth, jobs

# Submits in a process of its own: Ray reads the token and the mode once per process.
SUBMIT = """
import dataclasses, json, sys
from pathlib import Path
from heliostat.errors import HeliostatError
from heliostat.runtime import jobs

def echo(line):
    print(line, flush=True)

file, address, follow, *settings = sys.argv[1:]
try:
    result = jobs.submit(
        Path(file), address=address, settings=settings, follow=follow == "follow", echo=echo, _module="stand_in"
    )
except HeliostatError as error:
    print("REFUSED", type(error).__name__, error)
else:
    print("RESULT", json.dumps(dataclasses.asdict(result)))
"""

# What runs on the cluster in place of `heliostat run`: connects as a run does, and uses the module beside the file.
STAND_IN = """
import os, sys, time
import ray

print("arguments", sys.argv[1:])
print("python", sys.executable)
ray.init(address="auto", runtime_env={"working_dir": os.getcwd(), "env_vars": {"SWITCH": "on"}})

@ray.remote
def task():
    import my_model
    return my_model.WIDTH, os.environ["SWITCH"]

print("task", ray.get(task.remote()))
print("files", sorted(os.listdir(".")))
time.sleep(60 if sys.argv[2] == "slow.yaml" else 0)
sys.exit(3)
"""


def free_ports(count):
    """Ports that the system gives out, all above those that Ray gives to its workers (10002 to 19999)."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@pytest.fixture(scope="module")
def cluster():
    """A real `ray start --head` with a token and a home of its own; only its own processes are ended."""
    home = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # a Unix socket's path has 107 characters at most
    dashboard, client, agent = free_ports(3)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {
        "HOME": str(home),
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": "/usr/bin:/bin",
    }
    ray = str(Path(sys.executable).parent / "ray")
    subprocess.run([ray, "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
    command = f"{ray} start --head --block --port 0 --num-cpus 2 --temp-dir {home}/t --dashboard-port {dashboard}"
    command += f" --ray-client-server-port {client} --dashboard-agent-listen-port {agent}"
    with open(home / "log", "w") as log:
        head = subprocess.Popen(command.split(), env=environment, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + 120
        while not answers(address):
            assert head.poll() is None, (home / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.5)
        yield address, home
    finally:
        os.killpg(head.pid, signal.SIGKILL)
        head.wait()
        end_processes_of(home)
        shutil.rmtree(home, ignore_errors=True)


def answers(address):
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=2)
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def end_processes_of(home):
    """End what Ray started in sessions of its own: all that has the home of this cluster."""
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            found = f"HOME={home}".encode() in environment.read_bytes().split(b"\0")
        except OSError:
            continue  # it ended meanwhile, or is another user's
        if found:
            os.kill(int(environment.parent.name), signal.SIGKILL)


@pytest.fixture
def pipeline(tmp_path):
    """A folder with a pipeline file, the user's module, and what must stay at home."""
    (tmp_path / "toy.yaml").write_text("name: toy\nstages: [{name: train}]\n")
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    (tmp_path / "my_model.py").write_text("WIDTH = 5\n")
    for name in (".git", ".heliostat", ".venv", "mlruns", "__pycache__"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "large").write_bytes(b"0" * 1000)
    return tmp_path / "toy.yaml"


def start_submit(file, address, *, home, follow="follow", settings=(), **variables):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"HOME": str(home), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(
        [sys.executable, "-c", SUBMIT, str(file), address, follow, *settings],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def submit(*arguments, **options):
    output, _ = start_submit(*arguments, **options).communicate(timeout=200)
    return output


def result_of(output):
    (line,) = [line for line in output.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


def test_a_job_runs_the_pipeline_with_the_clusters_python_and_streams_its_output(cluster, pipeline):
    address, home = cluster
    output = submit(pipeline, address, home=home, settings=["stages.train.config.epochs=3", "stages.train.note='a b'"])
    arguments = ["run", "toy.yaml", "--address", "auto", "--set", "stages.train.config.epochs=3"]
    arguments += ["--set", "stages.train.note='a b'", "--set", f"storage={home}/heliostat/toy"]
    assert f"arguments {arguments}" in output
    assert f"python {sys.executable}" in output  # although the PATH of `ray start` does not name it
    assert "task (5, 'on')" in output
    assert "files ['my_model.py', 'stand_in.py', 'toy.yaml']" in output
    result = result_of(output)
    assert (result["status"], result["exit_code"]) == ("FAILED", 3)
    assert f"job {result['job_id']}: pipeline toy on {address}, storage ~/heliostat/toy on the cluster" in output
    assert f"ray job logs {result['job_id']} --follow --address {address}" in output
    assert "Uploading package" not in output
    assert "WebSocket" not in output


@pytest.mark.slow
def test_a_job_goes_on_after_its_terminal_closed_and_cannot_be_started_twice(cluster, pipeline):
    address, home = cluster
    slow = pipeline.rename(pipeline.with_name("slow.yaml"))
    follower = start_submit(slow, address, home=home)
    seen = ""
    while "files [" not in seen:
        line = follower.stdout.readline()
        assert line, seen
        seen += line
    follower.send_signal(signal.SIGINT)
    seen += follower.communicate(timeout=60)[0]
    result = result_of(seen)
    assert (result["status"], result["exit_code"]) == ("RUNNING", 130)
    assert f"job {result['job_id']} goes on; to follow it again:" in seen

    again = submit(slow, address, home=home)
    assert f"REFUSED HeliostatError job {result['job_id']} already runs pipeline toy on ~/heliostat/toy" in again

    environment = {**os.environ, "HOME": str(home), "RAY_AUTH_MODE": "token"}
    ray = str(Path(sys.executable).parent / "ray")
    subprocess.run([ray, "job", "stop", result["job_id"], "--address", address], env=environment, check=True)


def test_without_following_the_answer_comes_as_soon_as_the_job_is_accepted(cluster, pipeline):
    address, home = cluster
    output = submit(pipeline, address, home=home, follow="leave", settings=["storage=/shared/results"])
    result = result_of(output)
    assert (result["message"], result["exit_code"]) == ("submitted", 0)
    assert "storage /shared/results on the cluster" in output
    assert "arguments" not in output


def test_a_cluster_that_wants_a_token_is_told_from_one_that_does_not_answer(cluster, pipeline, tmp_path):
    address, _ = cluster
    no_token = submit(pipeline, address, home=tmp_path)
    assert f"REFUSED HeliostatError {address}: the cluster wants a token and there is none here; copy" in no_token
    wrong = submit(pipeline, address, home=tmp_path, RAY_AUTH_TOKEN="0" * 64)
    assert f"REFUSED HeliostatError {address}: the cluster refuses the token in RAY_AUTH_TOKEN; copy" in wrong
    off = submit(pipeline, address, home=tmp_path, RAY_AUTH_MODE="disabled")
    assert "the cluster wants a token, and RAY_AUTH_MODE is 'disabled': set it to 'token'" in off
    (port,) = free_ports(1)
    silent = submit(pipeline, f"http://127.0.0.1:{port}", home=tmp_path)
    assert f"REFUSED HeliostatError http://127.0.0.1:{port}: nothing answers" in silent


def test_the_address_that_is_given_counts_and_not_the_one_in_the_environment(cluster, pipeline):
    address, home = cluster
    output = submit(pipeline, address, home=home, follow="leave", RAY_ADDRESS="http://127.0.0.1:1")
    assert result_of(output)["exit_code"] == 0


@pytest.mark.parametrize("address", ["auto", "ray://head:10001", "head:8265"])
def test_only_the_address_of_a_dashboard_is_accepted(pipeline, address):
    with pytest.raises(SpecError, match=re.escape(f"--address {address}: a job is submitted to the dashboard")):
        jobs.submit(pipeline, address=address, echo=print)


def test_a_wrong_file_or_setting_is_refused_before_anything_is_sent(pipeline, tmp_path):
    nowhere = "http://127.0.0.1:1"
    with pytest.raises(SpecError, match=r"no such file; did you mean 'toy\.yaml'"):
        jobs.submit(tmp_path / "tyo.yaml", address=nowhere, echo=print)
    with pytest.raises(SpecError, match="no stage 'trian'; did you mean 'train'"):
        jobs.submit(pipeline, address=nowhere, settings=["stages.trian.config.epochs=3"], echo=print)
    pipeline.write_text("stages: []\n")
    with pytest.raises(SpecError, match="name: missing"):
        jobs.submit(pipeline, address=nowhere, echo=print)


def test_a_folder_that_is_too_big_is_refused_with_its_largest_entries(pipeline):
    data = pipeline.parent / "data"
    data.mkdir()
    with open(data / "images.bin", "wb") as file:
        file.truncate(120 * 2**20)
    with pytest.raises(SpecError, match=r"120\.0 MB would travel .* largest: data \(120\.0 MB\)"):
        jobs.check_upload(pipeline.parent)
    (pipeline.parent / ".rayignore").write_text("data\n")
    jobs.check_upload(pipeline.parent)


def test_what_never_travels_does_not_count(pipeline):
    with open(pipeline.parent / ".heliostat" / "model.pt", "wb") as file:
        file.truncate(200 * 2**20)
    jobs.check_upload(pipeline.parent)


@pytest.mark.parametrize(
    ("storage", "lasting"),
    [
        (None, "~/heliostat/toy"),
        ("results", "~/heliostat/toy"),
        ("./.heliostat", "~/heliostat/toy"),
        ("~/mine", "~/mine"),
        ("/shared", "/shared"),
        ("s3://bucket/x", "s3://bucket/x"),
    ],
)
def test_storage_inside_the_jobs_own_folder_is_replaced_by_one_that_lasts(storage, lasting):
    assert jobs._lasting_storage(storage, "toy") == lasting


@pytest.fixture
def no_token(tmp_path, monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # so that what the test sets is undone as well
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_token_is_used_where_there_is_one_and_no_mode_was_chosen(no_token, monkeypatch):
    assert not auth.use_token_if_present()
    assert "RAY_AUTH_MODE" not in os.environ
    (no_token / ".ray").mkdir()
    (no_token / ".ray" / "auth_token").write_text("secret")
    assert auth.use_token_if_present()
    assert os.environ["RAY_AUTH_MODE"] == "token"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert not auth.use_token_if_present()


def test_tokens_are_looked_for_in_rays_order(no_token, monkeypatch):
    assert auth.token_source() is None
    (no_token / ".ray").mkdir()
    (no_token / ".ray" / "auth_token").write_text("secret")
    assert auth.token_source() == str(no_token / ".ray" / "auth_token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/elsewhere")
    assert auth.token_source() == "/elsewhere"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    assert auth.token_source() == "RAY_AUTH_TOKEN"


def test_looking_for_a_token_does_not_import_ray():
    code = "import sys; from heliostat.runtime import auth; auth.use_token_if_present(); sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "setting", ["tracking.uri=http://user:hunter2@host", "stages.train.config.data_args.password=hunter2"]
)
def test_a_password_among_the_settings_of_a_job_is_refused_for_all_would_see_it(pipeline, setting):
    with pytest.raises(SpecError, match="whoever sees the job would see the password") as refused:
        jobs.submit(pipeline, address="http://head:8265", settings=[setting], echo=pytest.fail)
    assert "hunter2" not in str(refused.value)


def test_a_job_knows_the_command_that_submitted_it_and_suggests_that_one(tmp_path):
    submitted = "heliostat submit 'my toy.yaml' --set a=b --address http://head:8265"
    entrypoint = jobs._entrypoint("my toy.yaml", ["a=b"], "~/store", "heliostat.cli", submitted)
    shown = entrypoint.replace('exec "$PYTHON"', 'printf "%s\\n" "$HELIOSTAT_SUBMITTED_AS"; : ')
    done = subprocess.run(["sh", "-c", shown], capture_output=True, text=True, check=True)
    assert done.stdout == f"{submitted}\n"
