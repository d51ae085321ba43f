"""Machines, each with a store of its own of one pipeline, and a bucket behind them."""

from pathlib import Path

import pytest

from heliostat.core.spec import Pipeline, Stage, Task
from heliostat.mirror import Mirror, mirror_of


@pytest.fixture
def machine(tmp_path, s3):
    """A machine of its own: an empty store of the pipeline, and its mirror."""

    def make(name: str, storage: str = "s3://models/team") -> tuple[Path, Mirror]:
        task = Task(model="toy:build_model", data="toy:build_data")
        pipeline = Pipeline(
            name="toy", task=task, stages=[Stage("train", uses="train")], storage=storage, root=tmp_path / name
        )
        return pipeline.storage_folder, mirror_of(pipeline)

    return make
