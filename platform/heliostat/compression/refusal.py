"""Why torch would not export a model, in a line that starts with the place in the user's own code."""

import re
import traceback
from pathlib import Path

import torch
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

NOT_OWN = (Path(torch.__file__).parents[1], Path(traceback.__file__).parent, Path(__file__).parent)
"""Installed packages, Python's library, and what calls the exporters: an error's place is not in these."""
CALL = re.compile(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]+)')
"""A frame of the traceback that torch.export writes into its errors."""


def reason(error: BaseException) -> str:
    """What went wrong, on one line: `model.py:12: `if x.sum() > 0:`: control flow that depends on the data ...`."""
    from torch._dynamo.exc import Unsupported, UserError  # loads a compiler that tracing does without

    where = _where(_in_message(error) or _in_traceback(error))
    if isinstance(error, GuardOnDataDependentSymNode) or (
        isinstance(error, (Unsupported, UserError)) and "ata-dependent" in str(error)
    ):
        return f"{where}torch.export cannot follow what depends on the data; torch.where and torch.cond can"
    return where + first_lines(error)


def located(error: BaseException) -> str:
    """The error on one line, behind the place in the user's own code that raised it."""
    place = _in_traceback(error)
    return _where((Path(place[0]).name, *place[1:]) if place else None) + first_lines(error)


def first_lines(error: BaseException, limit: int = 300) -> str:
    """The kind of error and how its text begins."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= limit else text[:limit] + ' ...'}"


def _where(place: tuple[str, int, str] | None) -> str:
    return f"{place[0]}:{place[1]}: `{place[2]}`: " if place else ""


def _is_own(file: str) -> bool:
    return not any(folder in Path(file).parents for folder in NOT_OWN)


def _in_message(error: BaseException) -> tuple[str, int, str] | None:
    own = [(file, int(line), code) for file, line, code in CALL.findall(str(error)) if _is_own(file)]
    return own[-1] if own else None


def _in_traceback(error: BaseException) -> tuple[str, int, str] | None:
    frames = traceback.extract_tb(error.__traceback__)
    own = [(f.filename, f.lineno or 0, f.line or "") for f in frames if _is_own(f.filename)]
    return own[-1] if own else None
