"""Datasets of Ray Data are trained on as streams, wherever Ray reads them."""

import textwrap
import threading

import pytest

from heliostat.core.spec import Resources, Task
from heliostat.runtime.trainer import train_workers
from heliostat.training.config import TrainConfig

STREAMED = """
    import ray
    import toy

    def build_data():
        return {
            split: ray.data.from_items([{"x": x.numpy(), "y": int(y)} for x, y in zip(*rows.tensors)])
            for split, rows in toy.build_data().items()
        }
"""


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("workers", [1, 2])
def test_rows_of_ray_data_train_as_the_same_samples_do(root, tmp_path, reporter, workers):
    """With one batch an epoch the order does not matter. Reading needs CPUs that no worker holds."""
    (root / "streamed.py").write_text(textwrap.dedent(STREAMED))

    def train(data, workers):
        fit = train_workers(
            Task(model="toy:build_model", data=data),
            TrainConfig(epochs=2, batch_size=32),
            resources=Resources(workers=workers, cpus_per_worker=0.5),
            seed=0,
            root=root,
            folder=tmp_path / data.replace(":", "-"),
            reporter=reporter,
            cancel=threading.Event(),
        )
        return [row["val_loss"] for row in fit.history]

    assert train("streamed:build_data", workers) == pytest.approx(train("toy:build_data", 1), abs=1e-5)
