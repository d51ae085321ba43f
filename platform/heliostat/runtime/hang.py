"""The end of a process that trains alone and hangs, with a note of where it was.

Several workers wait for each other, which ends by itself; one is missed by nobody. The watchdog is Python's own
(`faulthandler.dump_traceback_later`): a thread that needs nothing of the interpreter, so what hangs in C ends as well.
"""

import faulthandler
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REARM_S = 1.0
"""No more often is the watchdog set anew, which starts a thread; it waits for so much longer."""
TRAINING = str(Path("heliostat", "training", "run.py"))
"""Where every training is entered: what is further out is not of interest."""


@contextmanager
def ended_if_it_hangs(timeout_s: float, *, note: Path) -> Iterator[Callable[[], None]]:
    """End this process when `timeout_s` pass without a step of any optimizer, or a call of what the block is given.

    `note` then holds where every thread was; it is empty until then, and gone when the block ends.
    """
    from torch.optim.optimizer import register_optimizer_step_post_hook

    set_at = -REARM_S

    def alive(*_: Any) -> None:
        nonlocal set_at
        now = time.monotonic()
        if now - set_at >= REARM_S:
            faulthandler.dump_traceback_later(timeout_s + REARM_S, exit=True, file=file)
            set_at = now

    note.parent.mkdir(parents=True, exist_ok=True)
    with note.open("w") as file:
        hook = register_optimizer_step_post_hook(alive)
        try:
            alive()
            yield alive
        finally:
            faulthandler.cancel_dump_traceback_later()
            hook.remove()
            note.unlink()


def where_it_hung(note: Path) -> str | None:
    """The frames of the training that hung, the innermost first; None when none did."""
    threads = note.read_text().split("\n\n") if note.exists() else []
    for frames in (thread.splitlines() for thread in threads):
        entry = [number for number, frame in enumerate(frames) if TRAINING in frame]
        if entry:
            return "\n".join(frame for frame in frames[: entry[0]] if frame.startswith("  File"))
    return None
