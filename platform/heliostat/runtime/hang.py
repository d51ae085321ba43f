"""The end of a process that works alone and hangs, with a note of where it was.

Several workers wait for each other, which ends by itself; one is missed by nobody. A thread looks about once a second
for a sign of life: an optimizer step, or, where no step is due since data is built, loaded or evaluated, that anything
is computed. Each sign winds up Python's own watchdog (`faulthandler.dump_traceback_later`), which needs nothing of the
interpreter, so what hangs in C and never lets go of the interpreter ends as well.
"""

import faulthandler
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

from heliostat.core.stage import StageContext, StageResult, call_stage
from heliostat.errors import StageError

NOTE = ".hang.txt"
LOOK_S = 1.0
OWN_SHARE, CHILDREN_SHARE, ALL_SHARE = 0.001, 0.01, 0.05
"""So much of a CPU's time is a sign of life: of the thread itself, even one that only waits for a slow download; of its
child processes; of all threads of the process, of which those of Ray take a hundredth when it is idle (measured)."""
PLUMBING = str(Path("heliostat", "runtime"))
"""Frames from here outwards are of no interest."""
_cpu_clock_of = getattr(time, "pthread_getcpuclockid", lambda thread: time.CLOCK_PROCESS_CPUTIME_ID)
"""macOS has no such clock of a thread."""


class _Reading(NamedTuple):
    """What the clocks say, in seconds, and how many signs of life there were."""

    at: float
    signs: int
    own_s: float
    all_s: float


class _Watch:
    """What another thread sees of one."""

    def __init__(self, thread: int) -> None:
        self.signs = self.waits = 0
        self._thread, self._clock = thread, _cpu_clock_of(thread)
        self._children_s = 0.0

    def read(self) -> _Reading:
        """What the thread that looks uses itself does not count."""
        own_s, all_s = time.clock_gettime(self._clock), time.process_time() - time.thread_time()
        return _Reading(time.monotonic(), self.signs, own_s, all_s)

    def is_alive(self, since: _Reading, now: _Reading) -> bool:
        """Whether there was a sign of it between two readings."""
        if now.signs > since.signs or self.waits:
            return True
        if self._is_in_step():
            return False
        passed = now.at - since.at
        if now.own_s - since.own_s >= OWN_SHARE * passed or now.all_s - since.all_s >= ALL_SHARE * passed:
            return True
        return self._children_used_s() >= CHILDREN_SHARE * passed

    def _is_in_step(self) -> bool:
        trainee = sys.modules.get("heliostat.training.trainee")
        if trainee is None:  # nobody trains here yet
            return False
        step = {trainee.Trainee.backward.__code__, trainee.Trainee.step.__code__}
        frame = sys._current_frames().get(self._thread)
        while frame is not None and frame.f_code not in step:
            frame = frame.f_back
        return frame is not None

    def _children_used_s(self) -> float:
        """Since this was last asked. It takes milliseconds, so it is asked last."""
        import psutil  # comes with Ray

        before, self._children_s = self._children_s, 0.0
        for child in psutil.Process().children(recursive=True):
            try:
                times = child.cpu_times()
            except psutil.NoSuchProcess:  # it ended meanwhile
                continue
            self._children_s += times.user + times.system
        return self._children_s - before


_watch: ContextVar[_Watch | None] = ContextVar("watch", default=None)


def alive() -> None:
    """A sign of life of this thread, if it is watched."""
    if (watch := _watch.get()) is not None:
        watch.signs += 1


@contextmanager
def waiting() -> Iterator[None]:
    """Within it this thread waits for another process, and nobody waits for a sign of its life."""
    if (watch := _watch.get()) is None:
        yield
        return
    watch.waits += 1
    try:
        yield
    finally:
        watch.waits -= 1


@contextmanager
def ended_if_it_hangs(timeout_s: float, *, note: Path) -> Iterator[None]:
    """End this process when the calling thread gives no sign of life for `timeout_s` (and up to `LOOK_S` more).

    `note` then holds where every thread was; until then which of them is meant. It is gone when the block ends.
    """
    from torch.optim.optimizer import register_optimizer_step_post_hook

    thread, over = threading.get_ident(), threading.Event()
    watch = _Watch(thread)

    def stepped(*_: Any) -> None:
        watch.signs += 1

    note.parent.mkdir(parents=True, exist_ok=True)
    with note.open("w") as file:
        file.write(f"Thread {thread:#018x}\n")  # as it is called there
        file.flush()

        def look() -> None:
            last = watch.read()
            while not over.wait(min(LOOK_S, timeout_s / 4)):
                since, last = last, watch.read()
                if watch.is_alive(since, last):
                    faulthandler.dump_traceback_later(timeout_s, exit=True, file=file)

        looking = threading.Thread(target=look, name="hang", daemon=True)
        hook, token = register_optimizer_step_post_hook(stepped), _watch.set(watch)
        try:
            faulthandler.dump_traceback_later(timeout_s, exit=True, file=file)
            looking.start()
            yield
        finally:
            over.set()
            looking.join()
            faulthandler.cancel_dump_traceback_later()
            _watch.reset(token)
            hook.remove()
            note.unlink()


def where_it_hung(note: Path) -> str | None:
    """The frames of the thread that hung, the innermost first; None when none did."""
    thread, _, dump = note.read_text().partition("\n") if note.exists() else ("", "", "")
    _, is_there, dumped = dump.partition(f"{thread} (")
    if not is_there:
        return None
    _, *frames = dumped.partition("\n\n")[0].splitlines()
    outside = next((number for number, frame in enumerate(frames) if PLUMBING in frame), 0)
    return "\n".join(frames[: outside or None])


@contextmanager
def told_where_it_hung(timeout_s: float, *, note: Path) -> Iterator[None]:
    """A StageError of the block, if a process hung there, is one that says so and where."""
    try:
        yield
    except StageError as error:
        reason = why_it_hung(timeout_s, note=note)
        if reason is None:
            raise
        raise StageError(reason) from error


def why_it_hung(timeout_s: float, *, note: Path) -> str | None:
    """For a person, if the process that left the note hung."""
    frames = where_it_hung(note)
    if frames is None:
        return None
    too_long = f"no sign of life for {timeout_s} s (resources.hang_timeout_s)"
    return f"it hangs: {too_long}; it was here, innermost first:\n{frames}"


def call_stage_watched(reference: str, context: StageContext, config: Mapping[str, Any]) -> StageResult:
    """`call_stage`, in a process that ends when the stage hangs."""
    with ended_if_it_hangs(context.resources.hang_timeout_s, note=context.folder / NOTE):
        return call_stage(reference, context, config)
