"""Ray's token: whether there is one, and making Ray use it.

A cluster that was started where a token exists asks everybody for it, but a client sends it only if `RAY_AUTH_MODE` is
`token`. So whoever has a token and says nothing about the mode means to use it. A client that sends a token to a
cluster without authentication is served as well. Ray is not imported here.
"""

import os
import sys
from pathlib import Path


def token_source() -> str | None:
    """Where Ray would find its token: the name of a variable or the path of a file, in Ray's order; None if nowhere."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    if os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return os.environ["RAY_AUTH_TOKEN_PATH"]
    default = Path.home() / ".ray" / "auth_token"
    return str(default) if default.is_file() else None


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
