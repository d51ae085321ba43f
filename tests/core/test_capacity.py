import math

import pytest

from heliostat.core.capacity import Capacity


@pytest.mark.parametrize(
    ("nodes", "cpus", "gpus", "expected"),
    [
        (((4, 0),), 1, 0, 4),
        (((4, 0), (3, 0)), 2, 0, 3),
        (((3, 0), (3, 0)), 4, 0, 0),
        (((1, 0),), 0.1, 0, 10),
        (((8, 2),), 1, 0.5, 4),
        (((8, 1),), 1, 0.1, 8),
        (((8, 0), (8, 2)), 1, 1, 2),
        (((2, math.inf),), 1, 3, 2),
    ],
)
def test_workers_are_counted_node_by_node_and_parts_of_a_gpu_add_up_to_it(nodes, cpus, gpus, expected):
    assert Capacity(nodes).workers(cpus, gpus) == expected


def test_a_capacity_reads_as_what_there_is():
    assert str(Capacity(((4, 0),))) == "4 CPUs"
    assert str(Capacity(((4, 1), (2, 1)))) == "6 CPUs and 2 GPUs on 2 nodes"
