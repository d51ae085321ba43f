import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from heliostat.core.imports import use_root
from heliostat.core.load import load_pipeline
from heliostat.training.config import TrainConfig
from heliostat.training.progress import Fit
from heliostat.training.run import run_training
from heliostat.training.world import World

CaseFile = Callable[[str], Path]
TrainStages = Callable[..., dict[str, Fit]]


@pytest.fixture
def case_file(tmp_path: Path) -> CaseFile:
    """Copy the folder of a case and return the pipeline file in it: `case_file("view/pipeline.yaml")`."""

    def copy(name: str) -> Path:
        folder, _, file = name.partition("/")
        return Path(shutil.copytree(Path(__file__).parent / folder, tmp_path / folder, dirs_exist_ok=True)) / file

    return copy


@pytest.fixture
def train_stages(case_file: CaseFile) -> TrainStages:
    """Run the `train` stages of a pipeline file, or those named, with one worker, in this process."""

    def run(name: str, only: Sequence[str] = ()) -> dict[str, Fit]:
        torch.set_num_threads(1)
        file = case_file(name)
        use_root(file.parent)
        pipeline = load_pipeline(file)
        stages = [s for s in pipeline.stages if s.uses == "train" and (not only or s.name in only)]
        configs = {s.name: TrainConfig.model_validate(s.config) for s in stages}
        return {name: run_training(pipeline.task, config, world=World(), seed=0) for name, config in configs.items()}

    return run
