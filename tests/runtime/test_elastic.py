"""How many workers there is room for, on a Ray of one node with two CPUs."""

import threading
import time

import pytest
import ray

from heliostat.core.spec import Resources
from heliostat.runtime import elastic

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture
def one_cpu_is_held():
    """One of the two CPUs has something else to do."""

    @ray.remote(num_cpus=1)
    class Holder:
        def here(self) -> None: ...

    holder = Holder.remote()
    ray.get(holder.here.remote())
    yield
    ray.kill(holder)


def workers(least, most):
    return Resources(workers={"min": least, "max": most})


def count(resources, cancelled=lambda: False):
    return elastic.count_workers(resources, is_cancelled=cancelled)


def test_there_are_as_many_workers_as_find_room_and_no_more_than_the_most(eventually):
    eventually(lambda: elastic._free(elastic.live_nodes(), Resources()) == 2, "both CPUs are free", timeout_s=30)
    assert count(workers(1, 4)) == 2
    assert count(Resources(workers={"min": 1, "max": 4}, cpus_per_worker=0.5)) == 4
    assert count(Resources(workers={"min": 1, "max": 3}, cpus_per_worker=0.5)) == 3


def test_what_others_hold_is_waited_for_briefly(one_cpu_is_held, monkeypatch):
    monkeypatch.setattr(elastic, "FREE_S", 1.0)
    started = time.monotonic()
    assert count(workers(1, 4)) == 1
    assert time.monotonic() - started >= 1.0


def test_less_than_the_least_is_waited_for_until_cancelled(one_cpu_is_held, monkeypatch):
    monkeypatch.setattr(elastic, "FREE_S", 0.0)
    cancelled = threading.Event()
    threading.Timer(1.5, cancelled.set).start()
    with pytest.raises(KeyboardInterrupt):
        count(workers(2, 4), cancelled=cancelled.is_set)


def test_room_counts_when_it_has_been_there_for_a_while(one_cpu_is_held, monkeypatch, eventually):
    eventually(lambda: elastic._free(elastic.live_nodes(), Resources()) == 1, "one CPU is free", timeout_s=30)
    monkeypatch.setattr(elastic, "GROW_AFTER_S", 0.5)
    has_room = elastic.watch_for_room(workers(1, 4), workers=1)
    assert not has_room()
    time.sleep(0.6)
    assert has_room()
    assert not elastic.watch_for_room(workers(1, 4), workers=4)()


def test_a_live_node_answers_and_one_that_is_gone_does_not():
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    assert elastic._answers(node)
    assert not elastic._answers({**node, "NodeManagerPort": 1})
