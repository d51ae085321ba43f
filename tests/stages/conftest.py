"""Stage functions called in this process, as a worker would call them, on a trained toy model."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from heliostat.core.artifact import Artifact, Record, digest_files, write_record
from heliostat.core.imports import use_root
from heliostat.core.load import load_pipeline
from heliostat.core.spec import Resources, Task
from heliostat.core.stage import StageContext, Unheard, find_kind
from heliostat.stages.models import fine_tune, save_trained
from heliostat.training.config import TrainConfig
from heliostat.training.task import build_model


@dataclass
class Rows(Unheard):
    """A reporter that keeps the rows of metrics."""

    rows: list[dict[str, float]] = field(default_factory=list)

    def metrics(self, values: Mapping[str, float], *, step: int, trial: str | None = None) -> None:
        self.rows.append(dict(values))


@dataclass(frozen=True)
class Bench:
    """Where stages are tried: the toy's folder and task, and a folder for what they make."""

    root: Path
    store: Path
    task: Task

    def context(self, name: str, **inputs: tuple[Artifact, ...]) -> StageContext:
        folder = self.store / name
        folder.mkdir(parents=True, exist_ok=True)
        return StageContext(
            node=name,
            folder=folder,
            root=self.root,
            task=self.task,
            seed=0,
            resources=Resources(),
            inputs=inputs,
            reporter=Rows(),
            cancel=threading.Event(),
        )

    def keep(self, name: str, kind: str = "model", *, files: Any = (), **fields: Any) -> Artifact:
        """Write the record of what is in the folder `name`."""
        folder = self.store / name
        folder.mkdir(parents=True, exist_ok=True)
        record = Record(
            kind=kind,
            pipeline="toy",
            node=name,
            stage=name,
            uses=name,
            fingerprint=name,
            identity={},
            files=digest_files(folder, files),
            **fields,
        )
        write_record(folder, record)
        return Artifact(folder, record)

    def train(self, config: TrainConfig) -> Artifact:
        """What the stage `train` makes, without Ray."""
        context = self.context("train")
        model = build_model(self.task, config.model_args)
        fitted = fine_tune(context, model, config)
        files = save_trained(context, model.eval(), config=config)
        params = {"train": config.model_dump(mode="json", exclude_unset=True)}
        return self.keep("train", files=files, metrics=fitted.metrics, params=params)

    def run(self, uses: str, config: Mapping[str, Any] | None = None, **inputs: Any) -> Artifact:
        """Run a built-in stage; an input is an artifact or a list of them."""
        kind = find_kind(uses)
        gathered = {slot: tuple(given) if isinstance(given, list) else (given,) for slot, given in inputs.items()}
        result = kind.function(self.context(uses, **gathered), kind.config.model_validate(config or {}))
        return self.keep(uses, files=result.files, metrics=result.metrics, params=result.params, details=result.details)


@pytest.fixture
def bench(toy, tmp_path) -> Bench:
    use_root(toy.folder)
    return Bench(toy.folder, tmp_path / "store", load_pipeline(toy.file).task)


@pytest.fixture
def trained(bench) -> Artifact:
    """A toy model after three epochs."""
    return bench.train(TrainConfig(epochs=3, model_args={"width": 16}, optimizer={"lr": 0.01}))
