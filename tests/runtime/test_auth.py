"""What a Ray asks of who comes to it, and what this process says to that."""

import http.server
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from heliostat.errors import SpecError
from heliostat.runtime import auth, health, session


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@contextmanager
def dashboard(answer):
    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(answer(self.headers["Authorization"]))
            self.end_headers()

        def log_message(self, *_): ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def open_ray():
    """A Ray, as far as it answers one question, that lets in everybody."""

    class Nodes(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):
        def GetAllNodeInfo(self, request, context):  # noqa: N802
            return gcs_service_pb2.GetAllNodeInfoReply()

    server = grpc.server(ThreadPoolExecutor(1))
    gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(Nodes(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


def test_a_dashboard_that_asks_for_a_token_is_told_from_one_that_does_not(home):
    with dashboard(lambda sent: 200) as address:
        assert auth.asks_for_token(address) is False
    with dashboard(lambda sent: 200 if sent == "Bearer right" else 401) as address:
        assert auth.asks_for_token(address) is True
    with dashboard(lambda sent: 500) as address:
        assert auth.asks_for_token(address) is None
    assert auth.asks_for_token("http://127.0.0.1:1") is None


def test_a_token_that_is_refused_is_told_from_one_that_is_taken(home, monkeypatch):
    with dashboard(lambda sent: 200 if sent == "Bearer right" else 401) as address:
        assert not auth.is_let_in(address)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
        assert not auth.is_let_in(address)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
        assert auth.is_let_in(address)
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        assert not auth.is_let_in(address)


def test_a_ray_that_lets_in_everybody_is_warned_of_with_what_to_type(home, open_ray):
    assert auth.asks_for_token(open_ray) is False
    warning = session._warning_of(open_ray)
    assert "asks for no token" in warning
    assert "RAY_AUTH_MODE=token ray start --head" in warning
    (finding,) = health.check_asks_for_token(open_ray)
    assert (finding.ok, finding.fix.split(";")[0]) == ("warning", "on its head node type: ray stop")


def test_the_ray_of_a_run_asks_for_a_token_and_refuses_a_wrong_one_before_anything_starts(
    ray_session, tmp_path, monkeypatch
):
    import ray

    address = ray.get_runtime_context().gcs_address
    assert auth.asks_for_token(address) is True
    assert auth.is_let_in(address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    with (
        pytest.raises(SpecError, match="the cluster refuses the token in RAY_AUTH_TOKEN; copy"),
        session.start(address, log=tmp_path / "ray.log", root=tmp_path),
    ):
        pass


def test_a_token_of_ray_is_written_for_its_owner_alone_and_one_that_is_there_stays(home):
    auth.make_token_private()
    file = home / ".ray" / "auth_token"
    token = file.read_text()
    assert (len(token), file.stat().st_mode & 0o777) == (64, 0o600)
    file.chmod(0o644)
    auth.make_token_private()
    assert (file.read_text(), file.stat().st_mode & 0o777) == (token, 0o600)


def test_no_token_is_written_where_one_is_named_or_none_is_wanted(home, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    auth.make_token_private()
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    auth.make_token_private()
    assert not (home / ".ray").exists()
