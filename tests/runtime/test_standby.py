import threading

import pytest
import ray

from heliostat.core.spec import Resources
from heliostat.runtime.standby import call_up, expected_nodes, forget
from heliostat.runtime.trainer import train_workers
from heliostat.training.config import TrainConfig

NODES = {"small": {"CPU": 2.0}, "large": {"CPU": 8.0}, "odd": {"CPU": 4.0, "scanner": 1.0}}


@pytest.mark.parametrize(
    ("resources", "nodes"),
    [
        (Resources(workers=2), ["small"] * 2),
        (Resources(workers=3), ["odd"] * 3),
        (Resources(workers=10), ["large"] * 8 + ["odd"] * 2),
        (Resources(workers=4, placement="spread"), ["large", "odd", "small", "large"]),
        (Resources(workers=1, custom_resources={"scanner": 1}), ["odd"]),
    ],
)
def test_workers_are_expected_where_ray_will_place_them(resources, nodes):
    assert expected_nodes(NODES, resources) == nodes


def train_workers_started():
    from ray._private.state import actors

    return sum(actor["ActorClassName"] == "TrainWorker" for actor in actors().values())


def test_a_training_takes_the_workers_that_stand_by_for_it(ray_session, task, root, tmp_path, reporter):
    resources, before = Resources(workers=2), train_workers_started()
    folder = tmp_path / "train" / "0123456789abcdef"
    try:
        call_up(folder.parent, resources)  # of the stage, when there is no plan yet
        call_up(folder, resources)
        train_workers(
            task,
            TrainConfig(epochs=1, batch_size=16),
            resources=resources,
            seed=0,
            root=root,
            folder=folder,
            reporter=reporter,
            cancel=threading.Event(),
        )
    finally:
        forget()
    assert [epoch for epoch, _ in reporter.rows[None]] == [1]
    assert train_workers_started() - before == 2


def test_a_worker_with_an_accelerator_does_not_stand_by(ray_session, tmp_path):
    before = train_workers_started()
    call_up(tmp_path, Resources(workers=2, gpus_per_worker=1))
    assert train_workers_started() == before
    assert ray.is_initialized()
