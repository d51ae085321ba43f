import os
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from heliostat.errors import ArtifactError, StageError
from heliostat.runtime.mailbox import relay
from heliostat.runtime.tasks import run_task

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def work(root):
    """Functions in a module of the project, so that a worker imports them as it would the user's."""
    (root / "work.py").write_text(
        textwrap.dedent("""
            import os, signal, time
            from pathlib import Path
            import torch
            from heliostat.errors import ArtifactError

            def add(a, b): return a + b
            def pid(): return os.getpid()
            def threads(): return torch.get_num_threads()
            def fail(): raise KeyError("which one?")
            def fail_ours(): raise ArtifactError("weights.pt is damaged")
            def die(): os.kill(os.getpid(), signal.SIGKILL)
            def sleep(s): time.sleep(s)

            def die_once(marker):
                if not Path(marker).exists():
                    Path(marker).touch()
                    die()
                return "alive"

            def report(reporter):
                for epoch in range(1, 4):
                    reporter.metrics({"loss": 1.0 / epoch}, step=epoch)
                reporter.progress(done=3, total=3)
        """)
    )
    import sys

    sys.path.insert(0, str(root))
    import work

    yield work
    sys.path.remove(str(root))


def test_a_function_of_the_users_module_runs_in_another_process(work, root):
    assert run_task(work.add, 1, 2, root=root) == 3
    assert run_task(work.pid, root=root) != os.getpid()


def test_a_worker_is_used_again(work, root):
    assert len({run_task(work.pid, root=root, held={"CPU": 2}) for _ in range(4)}) <= 2


def test_a_task_computes_with_as_many_threads_as_it_has_cpus(work, root):
    assert run_task(work.threads, root=root, held={"CPU": 2}) == 2
    assert run_task(work.threads, root=root, held={"CPU": 1}) == 1


def test_an_exclusive_task_holds_the_node_and_still_has_its_own_threads(work, root):
    assert run_task(work.threads, root=root, held={"CPU": 1}, exclusive=True) == 1


def test_an_error_comes_back_with_the_functions_own_traceback(work, root):
    with pytest.raises(StageError) as caught:
        run_task(work.fail, root=root)
    text = str(caught.value)
    assert text.startswith("KeyError: 'which one?'")
    assert "work.py" in text
    assert "ray" not in text


def test_an_error_of_ours_comes_back_as_itself(work, root):
    with pytest.raises(ArtifactError, match=r"^weights.pt is damaged$"):
        run_task(work.fail_ours, root=root)


def test_a_dead_process_is_told_as_such(work, root):
    with pytest.raises(StageError, match="its process was killed or crashed"):
        run_task(work.die, root=root)


def test_a_dead_process_is_tried_again_as_often_as_asked(work, root, tmp_path):
    assert run_task(work.die_once, str(tmp_path / "marker"), root=root, retries=1) == "alive"


def test_a_task_can_be_cancelled(work, root):
    cancel = threading.Event()
    threading.Timer(0.5, cancel.set).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_task(work.sleep, 600, root=root, cancel=cancel)
    assert time.monotonic() - started < 30


def test_tasks_run_side_by_side_from_several_threads(work, root):
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda i: run_task(work.add, i, 1, root=root), range(4))) == [1, 2, 3, 4]


def test_a_task_reports_to_the_drivers_reporter(work, root, reporter):
    with relay(reporter) as remote:
        run_task(work.report, remote, root=root)
    assert [epoch for epoch, _ in reporter.rows[None]] == [1, 2, 3]
