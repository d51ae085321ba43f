import http.server
import os
import resource
import socket
import subprocess
import sys
import threading
from collections import namedtuple
from importlib import metadata

import pytest

from heliostat.runtime import health, jobs
from heliostat.runtime.health import Finding, diagnose

Usage = namedtuple("Usage", "total used free")


def only(findings):
    (finding,) = findings
    return finding


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def no_ray(monkeypatch):
    monkeypatch.setattr(health, "joinable_here", set)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def write_token(home, mode=0o600):
    path = home / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text("secret")
    path.chmod(mode)


def test_a_healthy_machine_has_no_problem_and_whatever_is_not_ok_says_what_to_type(tmp_path, home, no_ray):
    findings = diagnose(tmp_path / "store", None, None)
    assert not [finding for finding in findings if finding.ok == "problem"]
    assert all(finding.fix for finding in findings if finding.ok != "ok")
    assert {"python", "libraries", "hyperopt", "storage", "token", "ray", "tracking"} <= {f.name for f in findings}
    assert not (tmp_path / "store").exists()


def test_a_check_that_fails_unexpectedly_is_a_finding_and_the_others_are_still_made(
    tmp_path, home, no_ray, monkeypatch
):
    monkeypatch.setattr(health.shutil, "disk_usage", lambda path: 1 / 0)
    found = {finding.name: finding for finding in diagnose(tmp_path, None, None)}
    assert found["storage"].ok == "problem"
    assert "ZeroDivisionError" in found["storage"].text
    assert found["python"].ok == "ok"


def test_an_old_library_is_named_with_the_range_and_the_command(monkeypatch):
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "2.9.0" if name == "ray" else real(name))
    finding = only(health.check_libraries())
    assert (finding.name, finding.ok) == ("ray", "problem")
    assert "2.9.0 is installed; heliostat needs" in finding.text
    assert finding.fix.startswith("pip install -c constraints.txt 'ray[")


def test_a_missing_library_is_a_problem(monkeypatch):
    real = metadata.version

    def version(name):
        if name == "onnx":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    assert only(health.check_libraries()) == Finding(
        "onnx", "problem", "is not installed", "pip install -c constraints.txt 'onnx>=1.23'"
    )


def test_a_hyperopt_that_does_not_import_is_told_with_the_versions_that_matter(monkeypatch):
    def fail(name):
        raise ImportError("No module named 'pkg_resources'")

    monkeypatch.setattr(health.importlib, "import_module", fail)
    finding = only(health.check_hyperopt())
    assert finding.ok == "problem"
    assert "pkg_resources" in finding.text
    assert f"hyperopt {metadata.version('hyperopt')}" in finding.text
    assert "hyperopt>=0.3" in finding.fix


@pytest.mark.parametrize(("free_gb", "ok"), [(0.5, "problem"), (2, "warning"), (50, "ok")])
def test_room_on_the_disk_is_graded(tmp_path, monkeypatch, free_gb, ok):
    monkeypatch.setattr(health.shutil, "disk_usage", lambda path: Usage(1e12, 0, free_gb * 1e9))
    assert only(health.check_storage(str(tmp_path / "not" / "yet" / "there"))).ok == ok


def test_storage_that_cannot_be_written_is_a_problem():
    finding = only(health.check_storage("/proc/heliostat"))
    assert finding.ok == "problem"
    assert "/proc cannot be written" in finding.text


def test_a_bucket_is_written_listed_read_and_left_as_it_was(s3):
    bucket, here = health.check_storage("s3://models/team")
    assert bucket == Finding("storage", "ok", "s3://models/team: can be read and written")
    assert here.ok == "ok"
    assert not [key for key in s3.objects() if not key.endswith("/")]


def test_a_bucket_that_is_not_there_or_does_not_answer_is_a_problem_with_what_to_do(s3):
    missing = health.check_bucket("s3://nobodys/team")
    assert (missing.ok, missing.fix.split(";")[0]) == ("problem", "make it: aws s3 mb s3://BUCKET")
    assert missing.text.startswith("s3://nobodys/team: ")
    s3.stop()
    silent = health.check_bucket("s3://models/team")
    assert silent.ok == "problem"
    assert "NETWORK_CONNECTION" in silent.text
    assert silent.fix.startswith("see who answers")
    s3.start()


def test_a_bucket_that_takes_nothing_is_a_problem_with_the_rights_that_are_missing(s3, monkeypatch):
    from moto.s3.exceptions import S3AccessDeniedError
    from moto.s3.models import S3Backend

    def refuse(*_, **__):
        raise S3AccessDeniedError()

    monkeypatch.setattr(S3Backend, "put_object", refuse)
    finding = health.check_bucket("s3://models/team")
    assert finding.text.startswith("s3://models/team: cannot be written: ")
    assert "s3:ListBucket, GetObject, PutObject and DeleteObject" in finding.fix


def test_a_url_of_another_kind_is_no_storage():
    finding = only(health.check_storage("gs://models"))
    assert finding.text == "gs://models is neither a folder nor s3://BUCKET/PREFIX"


def test_little_shared_memory_is_a_warning(monkeypatch):
    monkeypatch.setattr(health.shutil, "disk_usage", lambda path: Usage(64e6, 0, 64e6))
    finding = only(health.check_shared_memory())
    assert finding.ok == "warning"
    assert "0.06 GB" in finding.text
    assert "--shm-size" in finding.fix


def test_few_open_files_are_a_warning_with_the_highest_limit_allowed(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda what: (1024, 4096))
    assert only(health.check_open_files()).fix == "ulimit -n 4096"
    monkeypatch.setattr(resource, "getrlimit", lambda what: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert only(health.check_open_files()).ok == "ok"


def test_the_token_and_its_mode_are_checked_together(home, monkeypatch):
    assert only(health.check_token()).ok == "ok"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert only(health.check_token()).fix == "ray get-auth-token --generate"
    write_token(home)
    assert only(health.check_token()).ok == "ok"
    monkeypatch.setenv("RAY_AUTH_MODE", "tokens")
    assert only(health.check_token()).fix == "export RAY_AUTH_MODE=token"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "nothing"))
    assert only(health.check_token()).fix == "unset RAY_AUTH_TOKEN_PATH"


def test_a_token_that_others_can_read_is_a_warning(home):
    write_token(home, mode=0o644)
    assert only(health.check_token()).fix == f"chmod 600 {home}/.ray/auth_token"


def test_a_port_that_another_program_holds_is_a_warning(home, no_ray, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(health, "PORTS", {port: "--dashboard-port"})
        running, taken = health.check_ray(None)
    assert running.ok == "ok"
    assert (taken.name, taken.ok) == (f"port {port}", "warning")
    assert "--dashboard-port=ANOTHER" in taken.fix


def test_a_ray_that_a_run_has_embedded_is_none_that_others_could_join(ray_session):
    script = "from heliostat.runtime.embedded import joinable_here; print(joinable_here())"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    import ray

    assert ray.get_runtime_context().gcs_address not in found.stdout


def test_an_address_where_nothing_runs_is_a_problem(home, no_ray):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        finding = only(health.check_ray(f"127.0.0.1:{probe.getsockname()[1]}"))
    assert finding.ok == "problem"
    assert "nothing answers at 127.0.0.1" in finding.text
    assert only(health.check_ray("auto")).fix == "ray start --head"


def test_a_ray_here_that_nobody_asked_for_and_that_does_not_answer_is_only_a_warning(home, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
        monkeypatch.setattr(health, "joinable_here", lambda: {address})
        assert only(health.check_ray(None)).ok == "warning"


def test_a_dashboard_of_another_version_is_a_problem(home, monkeypatch):
    monkeypatch.setattr(jobs, "cluster_version", lambda address: "2.9.0")
    finding = only(health.check_ray("http://head:8265"))
    assert finding.ok == "problem"
    assert "runs Ray 2.9.0" in finding.text
    assert "ray==2.9.0" in finding.fix


def test_a_dashboard_that_does_not_answer_is_a_problem(home):
    finding = only(health.check_ray("http://127.0.0.1:1"))
    assert finding.ok == "problem"
    assert "nothing answers" in finding.text


def test_a_tracking_server_is_asked_for_its_health(monkeypatch):
    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert only(health.check_tracking(address)).ok == "ok"
        assert only(health.check_tracking(f"{address}/mlflow")).text.endswith("answers 404 to /health")
        server.shutdown()
    silent = only(health.check_tracking(address))
    assert silent.ok == "warning"
    assert silent.fix.startswith("mlflow server")
    assert only(health.check_tracking(None)).ok == "ok"
    assert only(health.check_tracking("sqlite:///x.db")).ok == "ok"


def test_the_doctor_changes_no_environment_but_the_mode_that_a_token_asks_for(tmp_path, home, no_ray):
    before = dict(os.environ)
    diagnose(tmp_path, None, None)
    assert dict(os.environ) == before
