"""Many items of one function, each in a task, from stages that are tasks themselves."""

import os
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from heliostat.errors import SpecError, StageError
from heliostat.runtime.side_by_side import side_by_side
from heliostat.runtime.tasks import run_task

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def parts(root):
    """What is done to each item, in a module of the project."""
    (root / "parts.py").write_text(
        textwrap.dedent("""
            import os, signal
            from pathlib import Path
            import torch
            from heliostat.errors import SpecError
            from heliostat.runtime.side_by_side import side_by_side

            class Table:
                def __init__(self, rows): self.rows = rows

            def look_up(table, index): return int(table.rows[index]), os.getpid(), torch.get_num_threads()
            def refuse(shared, item): raise SpecError(f"no item {item}")
            def fail(shared, item): return {}[item]

            def die_once(folder, item):
                if not Path(folder, item).exists():
                    Path(folder, item).touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                return item

            def stage(root, count):
                return sum(n for n, *_ in side_by_side(look_up, Table(torch.arange(count)), range(count), root=root))
        """)
    )
    sys.path.insert(0, str(root))
    import parts

    yield parts
    sys.path.remove(str(root))


def test_each_item_has_a_process_of_one_thread_and_results_keep_their_order(parts, root):
    found = side_by_side(parts.look_up, parts.Table(torch.arange(10, 14)), range(4), root=root)
    assert [number for number, *_ in found] == [10, 11, 12, 13]
    assert os.getpid() not in {pid for _, pid, _ in found}
    assert {threads for *_, threads in found} == {1}


def test_a_single_item_and_what_cannot_be_pickled_stay_in_this_process(parts, root):
    assert side_by_side(parts.look_up, parts.Table([7]), [0], root=root)[0][:2] == (7, os.getpid())
    stuck = parts.Table([7, 8])
    stuck.lock = sys._getframe()
    assert {pid for _, pid, _ in side_by_side(parts.look_up, stuck, [0, 1], root=root)} == {os.getpid()}


@pytest.mark.parametrize("held", [1, 2], ids=["two stages of one CPU", "one after another with every CPU"])
def test_stages_that_hold_every_cpu_get_on_with_their_items(parts, root, held):
    with ThreadPoolExecutor(2) as pool:
        stages = partial(run_task, parts.stage, root, root=root, held={"CPU": held})
        assert list(pool.map(stages, [4, 5])) == [6, 10]


def test_an_item_whose_process_died_is_tried_again_as_often_as_asked(parts, root, tmp_path):
    assert side_by_side(parts.die_once, str(tmp_path), ["a", "b"], root=root, retries=1) == ["a", "b"]
    with pytest.raises(StageError, match="its process was killed or crashed"):
        side_by_side(parts.die_once, str(tmp_path), ["c", "d"], root=root)


def test_what_an_item_raises_comes_back_as_from_any_task(parts, root):
    with pytest.raises(SpecError, match=r"^no item [12]$"):
        side_by_side(parts.refuse, None, [1, 2], root=root)
    with pytest.raises(StageError, match="KeyError: 'x'"):
        side_by_side(parts.fail, None, ["x", "x"], root=root)
