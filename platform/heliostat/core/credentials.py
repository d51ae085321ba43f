"""Passwords in a pipeline: taken out where it is read, so that nothing that is stored or shown afterwards has them.

The user and the password of a URI, and values of keys such as `password` or `api_key` in the config of a stage, go into
the environment of this process, which its children inherit and no other user can read. In their place stands a URI
without them, or `hidden:KEY`. Who needs the real one, to connect or to call the user's function, asks here for it.
`env:NAME` as the value of such a key means a variable that the user sets, on each machine.
"""

import json
import os
import re
import sys
from collections.abc import Mapping
from typing import Any, Final, TypeVar
from urllib.parse import unquote

from heliostat.errors import SpecError

T = TypeVar("T")

VAULT: Final = "HELIOSTAT_CREDENTIALS"
"""The variable that holds them, as JSON: by the host of a URI, or by what stands in place of a value."""
MASK: Final = "***"
HIDDEN, FROM_ENVIRONMENT = "hidden:", "env:"
USER, PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"

_USER_INFO = re.compile(r"(?P<scheme>[a-zA-Z][a-zA-Z0-9+.\-]*://)(?P<user>[^\s/?#'\"<>]*)@(?P<host>[^\s/?#'\"<>@]+)")
_KEY = (
    r"(?:password|passwd|passphrase|secret|credentials?|api[_-]?key|(?:access|secret|private|account)[_-]?key(?:[_-]?id)?"
    r"|(?:access|auth|api|bearer|refresh|session|security|hf|github|gitlab)[_-]?token)"
)
_IS_CREDENTIAL = re.compile(rf"(?i)(?:.*[._-])?{_KEY}|token")
_ASSIGNED = re.compile(rf"(?i)(\b(?:[\w.-]*[._-])?{_KEY}=|[?&]token=)(?!{HIDDEN}|{FROM_ENVIRONMENT})[^\s&;,)}}]+")


def is_credential(key: Any, value: Any) -> bool:
    """Whether this looks like a password under a key that says so. `pad_token` and `num_tokens` do not."""
    is_value = isinstance(value, str | int) and not isinstance(value, bool) and value != ""
    return is_value and isinstance(key, str) and _IS_CREDENTIAL.fullmatch(key) is not None


def redacted(shown: T) -> T:
    """A text or a document to be shown, without the users and passwords of URIs and the values of such keys."""
    if isinstance(shown, str):
        text = _USER_INFO.sub(rf"\g<scheme>{MASK}@\g<host>", shown)
        return _ASSIGNED.sub(rf"\g<1>{MASK}", text)  # type: ignore[return-value]
    if isinstance(shown, Mapping):
        return {  # type: ignore[return-value]
            key: MASK if is_credential(key, value) and not _stands_for_one(value) else redacted(value)
            for key, value in shown.items()
        }
    if isinstance(shown, list | tuple):
        return type(shown)(map(redacted, shown))
    return shown


def has_credentials(argument: str) -> bool:
    """Whether a word of a command line has any, or what stands for one that only this machine knows."""
    path, equals, value = argument.partition("=")
    in_clear = _USER_INFO.search(argument) or (equals and is_credential(path.rpartition(".")[2], value))
    return bool(in_clear) or HIDDEN in value or with_user(value) != value


# --- out of the pipeline -----------------------------------------------------------------------------


def without_user(uri: str) -> str:
    """A URI, or a text with some, without user and password, which are kept for `with_user`."""

    def keep(found: re.Match[str]) -> str:
        _keep(found["host"], found["user"])
        return found["scheme"] + found["host"]

    return _USER_INFO.sub(keep, uri)


def hide(config: Any, *, place: str) -> Any:
    """A config in which `hidden:PLACE` stands for each value of a key that looks like a credential."""
    if isinstance(config, str):
        return without_user(config)
    if isinstance(config, Mapping):
        return {key: _hidden(key, value, f"{place}.{key}") for key, value in config.items()}
    if isinstance(config, list | tuple):
        return type(config)(hide(value, place=f"{place}.{index}") for index, value in enumerate(config))
    return config


def _hidden(key: Any, value: Any, place: str) -> Any:
    if not is_credential(key, value):
        return hide(value, place=place)
    if _stands_for_one(value):
        return value
    _keep(HIDDEN + place, value)
    return HIDDEN + place


def _stands_for_one(value: Any) -> bool:
    return isinstance(value, str) and value.startswith((HIDDEN, FROM_ENVIRONMENT))


def hide_in_argument(argument: str) -> str:
    """A word of a command line without credentials: other users see it in `ps`."""
    option = "--set=" if argument.startswith("--set=") else ""
    path, equals, value = argument.removeprefix(option).partition("=")
    if equals and is_credential(path.rpartition(".")[2], value) and not _stands_for_one(value):
        _keep(HIDDEN + path, value)
        return f"{option}{path}={HIDDEN}{path}"
    return without_user(argument)


def keep_passwords_out_of_sight() -> None:
    """Begin this command again without passwords in its flags, which all users of the machine and of a Ray can see."""
    words = [hide_in_argument(word) for word in sys.orig_argv]
    if words != sys.orig_argv:
        os.execv(sys.executable, words)


# --- for who needs them ------------------------------------------------------------------------------


def with_user(uri: str) -> str:
    """A URI with the user and the password that were taken out of it, if any."""
    scheme, separator, rest = uri.partition("://")
    user = _kept().get(re.split(r"[/?#]", rest, maxsplit=1)[0]) if separator else None
    return f"{scheme}://{user}@{rest}" if user else uri


def revealed(arguments: T, *, place: str = "") -> T:
    """Arguments for the user's function, with the values that stand hidden in them.

    Raises SpecError where this process does not have one.
    """
    if isinstance(arguments, Mapping):
        return {key: revealed(value, place=f"{place}.{key}") for key, value in arguments.items()}  # type: ignore[return-value]
    if isinstance(arguments, list | tuple):
        return type(arguments)(revealed(value, place=place) for value in arguments)
    if not isinstance(arguments, str):
        return arguments
    key = place.rpartition(".")[2]
    if not (is_credential(key, arguments) and _stands_for_one(arguments)):
        return with_user(arguments)  # type: ignore[return-value]
    name = arguments.removeprefix(FROM_ENVIRONMENT)
    value: Any = os.environ.get(name) if name != arguments else _kept().get(arguments)
    if value is None:
        what = f"the variable {name} is not set" if name != arguments else "it is not known to this process"
        advice = f"write `{key}: {FROM_ENVIRONMENT}NAME` and set that variable wherever the pipeline runs"
        raise SpecError(f"{place.removeprefix('.')}: {what}; {advice}")
    return value  # type: ignore[no-any-return]


def use_for_mlflow(uri: str) -> str:
    """Let MLflow, in this process and its children, use what was taken out of `uri`; the URI for its client.

    A server's user and password are MLflow's own variables, which MLflow's keyring file `~/.mlflow/credentials` may
    stand for; a database has them in its URI.
    """
    if not uri.startswith(("http://", "https://")):
        found = with_user(uri)
        user, password = os.environ.get(USER), os.environ.get(PASSWORD)
        if found == uri and user and password and "://" in uri and not uri.startswith(("sqlite:", "file:")):
            return uri.replace("://", f"://{user}:{password}@", 1)
        return found
    full = with_user(uri)
    if full != uri:
        user, _, password = full.partition("://")[2].rpartition("@")[0].partition(":")
        os.environ[USER], os.environ[PASSWORD] = unquote(user), unquote(password)
    return uri


def _kept() -> dict[str, Any]:
    kept: dict[str, Any] = json.loads(os.environ.get(VAULT, "{}"))
    return kept


def _keep(name: str, value: Any) -> None:
    os.environ[VAULT] = json.dumps({**_kept(), name: value})
