"""Metrics that fail on some samples, and metrics that give something else than a float."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import Dataset

from heliostat import run
from heliostat.core.artifact import read_record
from heliostat.core.imports import use_root
from heliostat.core.load import load_pipeline
from heliostat.errors import StageError
from heliostat.stages.measure import Quality, evaluate_with_intervals
from heliostat.training.progress import Fit
from heliostat.training.task import build_data, build_model, build_objective


@pytest.fixture
def measured(case_file: Callable[[str], Path]) -> Callable[..., Quality]:
    """The quality of an untrained model of the case."""

    def measure(file: str, *, split: str, **data_args: Any) -> Quality:
        path = case_file(f"metric_raises/{file}")
        use_root(path.parent)
        task = load_pipeline(path).task
        data: Mapping[str, Dataset[Any]] = build_data(task, data_args)
        return evaluate_with_intervals(build_model(task, {}), data[split], build_objective(task), split=split)

    return measure


def test_a_metric_that_fails_on_a_resample_has_no_interval_and_the_reason_is_kept(
    measured: Callable[..., Quality],
) -> None:
    quality = measured("pipeline.yaml", split="val")
    assert set(quality.figures) == {"val_loss", "val_auc"}
    assert quality.missing["val_auc_low"].startswith("no interval: it fails on resample")


def test_a_metric_that_fails_on_all_of_test_is_left_out_and_the_reason_is_kept(
    measured: Callable[..., Quality],
) -> None:
    quality = measured("pipeline.yaml", split="test", rare_in_test=0)
    assert set(quality.figures) == {"test_loss"}
    assert quality.missing["test_auc"].startswith("task.metrics: auc fails on `test`, for outputs (60, 3)")


def test_metrics_may_give_tensors_numpy_numbers_and_bools(measured: Callable[..., Quality]) -> None:
    quality = measured("ok.yaml", split="val")
    assert {f"val_{name}{end}" for name in ("accuracy", "np_accuracy", "is_good") for end in ("", "_low")} < set(
        quality.figures
    )
    assert all(type(figure) is float for figure in quality.figures.values())


def test_a_metric_that_gives_no_number_is_named_after_the_first_epoch(
    train_stages: Callable[[str], dict[str, Fit]],
) -> None:
    with pytest.raises(StageError, match=r"task.metrics: by_class fails on `val`.*not 'dict'"):
        train_stages("metric_raises/by_class.yaml")


@pytest.mark.slow
def test_the_record_says_why_a_figure_has_no_interval(case_file: Callable[[str], Path]) -> None:
    (node,) = run(load_pipeline(case_file("metric_raises/pipeline.yaml"))).nodes
    assert node.path is not None
    assert "val_auc_low" in read_record(node.path).details["missing"]
