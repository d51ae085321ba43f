"""Ray's token: whether there is one, and making Ray use it.

A cluster that was started where a token exists asks everybody for it, but a client sends it only if `RAY_AUTH_MODE` is
`token`. So whoever has a token and says nothing about the mode means to use it. A client that sends a token to a
cluster without authentication is served as well. An embedded Ray always has a token: where there is none Ray writes
one, readable by every user of the machine, so it is written here instead.

`ray start` asks for a token only where one exists and `RAY_AUTH_MODE` is not `disabled`; on a fresh machine it warns
and lets in everybody. What a cluster does is found out by asking it something without a token.
"""

import os
import secrets
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Final

OPEN: Final = (
    "asks for no token: anyone who reaches it can run anything there; on its head node type: ray stop; "
    "ray get-auth-token --generate; chmod 600 ~/.ray/auth_token; RAY_AUTH_MODE=token ray start --head"
)
ASK_TIMEOUT_S = 5.0


def token_source() -> str | None:
    """Where Ray would find its token: the name of a variable or the path of a file, in Ray's order; None if nowhere."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    if os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return os.environ["RAY_AUTH_TOKEN_PATH"]
    return str(_default()) if _default().is_file() else None


def make_token_private() -> None:
    """Create a token in Ray's default file if there is none anywhere, and make that file private to its owner."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token" or token_source() not in (None, str(_default())):
        return
    file = _default()
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        if file.stat().st_uid == os.getuid():
            file.chmod(0o600)
    else:
        with open(descriptor, "w", encoding="ascii") as written:
            written.write(secrets.token_hex(32))


def _default() -> Path:
    return Path.home() / ".ray" / "auth_token"


def use_token_if_present() -> bool:
    """Set `RAY_AUTH_MODE=token` for this process and its children if there is a token and no mode was chosen.

    Call it before connecting. Returns whether Ray will send a token.
    """
    if "RAY_AUTH_MODE" not in os.environ:
        if token_source() is None:
            return False
        os.environ["RAY_AUTH_MODE"] = "token"
        if "ray" in sys.modules:
            # Ray read the variable when it was imported; this makes it look again.
            sys.modules["ray"]._raylet.Config.initialize("")
    return os.environ["RAY_AUTH_MODE"].lower() == "token"


def token_advice(has_token: bool) -> str:
    """What is wrong and what to do where a cluster does not let this process in."""
    copy = "copy ~/.ray/auth_token of the head node to ~/.ray/auth_token here"
    if has_token and (source := token_source()):
        return f"the cluster refuses the token in {source}; {copy}, readable by you alone"
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        mode = os.environ["RAY_AUTH_MODE"]
        return f"the cluster wants a token, and RAY_AUTH_MODE is {mode!r}: set it to 'token' and {copy}"
    return f"the cluster wants a token and there is none here; {copy}, readable by you alone"


def asks_for_token(address: str) -> bool | None:
    """Whether the Ray at `http://host:port` (its dashboard), `host:port` or `ray://host:port` does; None: unknown."""
    accepted = _accepts(address, None)
    return None if accepted is None else not accepted


def is_let_in(address: str) -> bool:
    """Whether the Ray there, which asks for a token, takes the one that is here, if Ray is to send it."""
    source = token_source()
    if source is None or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return False
    token = os.environ["RAY_AUTH_TOKEN"] if source == "RAY_AUTH_TOKEN" else Path(source).read_text(encoding="utf-8")
    return _accepts(address, token.strip()) is not False


def _accepts(address: str, token: str | None) -> bool | None:
    header = {} if token is None else {"authorization": f"Bearer {token}"}
    if address.startswith(("http://", "https://")):
        request = urllib.request.Request(f"{address.rstrip('/')}/api/version", headers=header)
        try:
            urllib.request.urlopen(request, timeout=ASK_TIMEOUT_S).close()
        except urllib.error.HTTPError as error:
            return False if error.code in (401, 403) else None
        except (OSError, ValueError):
            return None
        return True
    return _accepts_rpc(address, tuple(header.items()))


def _accepts_rpc(address: str, metadata: tuple[tuple[str, str], ...]) -> bool | None:
    import grpc  # type: ignore[import-untyped]
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc, ray_client_pb2, ray_client_pb2_grpc

    with grpc.insecure_channel(address.removeprefix("ray://")) as channel:
        try:
            if address.startswith("ray://"):
                ping = ray_client_pb2.ClusterInfoRequest(type=ray_client_pb2.ClusterInfoType.PING)
                client = ("client_id", secrets.token_hex(16))
                driver = ray_client_pb2_grpc.RayletDriverStub(channel)
                driver.ClusterInfo(ping, timeout=ASK_TIMEOUT_S, metadata=(client, *metadata))
            else:
                question = gcs_service_pb2.GetAllNodeInfoRequest(limit=1)
                nodes = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
                nodes.GetAllNodeInfo(question, timeout=ASK_TIMEOUT_S, metadata=metadata)
        except grpc.RpcError as error:
            return False if error.code() is grpc.StatusCode.UNAUTHENTICATED else None
    return True
