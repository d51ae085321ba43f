"""Ray's token: whether there is one, and making Ray use it.

A cluster that was started where a token exists asks everybody for it, but a client sends it only if `RAY_AUTH_MODE` is
`token`. So whoever has a token and says nothing about the mode means to use it. A client that sends a token to a
cluster without authentication is served as well. An embedded Ray always has a token: where there is none Ray writes
one, readable by every user of the machine, so it is written here instead. Ray is not imported here.
"""

import os
import secrets
import sys
from pathlib import Path


def token_source() -> str | None:
    """Where Ray would find its token: the name of a variable or the path of a file, in Ray's order; None if nowhere."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    if os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return os.environ["RAY_AUTH_TOKEN_PATH"]
    return str(_default()) if _default().is_file() else None


def make_token_private() -> None:
    """Have a token in Ray's default file, if there is none anywhere, and let nobody but its owner read that file."""
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
