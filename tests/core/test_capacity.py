import math

import pytest

from heliostat.core.capacity import Capacity, Need, amount
from heliostat.core.spec import Resources


@pytest.mark.parametrize(
    ("nodes", "each", "expected"),
    [
        ([{"CPU": 4}], {"CPU": 1}, 4),
        ([{"CPU": 4}, {"CPU": 3}], {"CPU": 2}, 3),
        ([{"CPU": 3}, {"CPU": 3}], {"CPU": 4}, 0),
        ([{"CPU": 1}], {"CPU": 0.1}, 10),
        ([{"CPU": 8, "GPU": 2}], {"CPU": 1, "GPU": 0.5}, 4),
        ([{"CPU": 8, "GPU": 1}], {"CPU": 1, "GPU": 0.1}, 8),
        ([{"CPU": 8}, {"CPU": 8, "GPU": 2}], {"CPU": 1, "GPU": 1}, 2),
        ([{"CPU": 8}, {"CPU": 8, "licence": 3}], {"CPU": 1, "licence": 1}, 3),
        ([{"CPU": 8, "accelerator_type:T4": 1}, {"CPU": 4}], {"CPU": 1, "accelerator_type:T4": 0.001}, 8),
        ([{"CPU": 8, "accelerator_type:T4": 1}], {"CPU": 1, "accelerator_type:A100": 0.001}, 0),
    ],
)
def test_workers_are_counted_node_by_node_and_parts_of_a_gpu_add_up_to_it(nodes, each, expected):
    assert Capacity(tuple(nodes)).workers(each) == expected


def test_a_node_may_have_more_than_is_known_of_it():
    assert Capacity(({"CPU": 2},), unsaid=math.inf).workers({"CPU": 1, "GPU": 3, "licence": 1}) == 2


def test_a_capacity_reads_as_what_there_is():
    assert str(Capacity(({"CPU": 4},))) == "4 CPUs"
    assert str(Capacity(({"CPU": 4, "GPU": 1}, {"CPU": 2, "GPU": 1}))) == "6 CPUs and 2 GPUs on 2 nodes"
    told = {"CPU": 4.0, "memory": 9e9, "object_store_memory": 4e9, "node:10.0.0.1": 1.0, "licence": 2.0}
    assert str(Capacity.of([told])) == "4 CPUs and 2 licence"


def test_a_need_reads_as_what_all_its_workers_hold():
    resources = Resources(gpus_per_worker=0.5, custom_resources={"licence": 1}, accelerator_type="T4")
    assert str(Need(4, resources.per_worker)) == "4 CPUs, 2 GPUs, 4 licence and accelerator T4"
    assert amount(Resources().per_worker) == "1 CPUs"
