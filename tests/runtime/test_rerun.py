"""Any trial of a search run again on its own: the same figures, the same end, and nothing of the search is touched."""

import math
import textwrap
import threading
from dataclasses import replace

import pytest

from heliostat.core.spec import Resources, Task
from heliostat.core.stage import StageContext, Unheard
from heliostat.errors import SpecError
from heliostat.runtime.one_trial import Rerun
from heliostat.stages.rerun import ended_trial, rerun
from heliostat.stages.tune import TuneConfig, tune

DRAWN = """
    import torch
    from torch.utils.data import TensorDataset

    def build_data():
        \"\"\"From the global generator: other data for each seed.\"\"\"
        inputs = torch.randn(96, 4)
        targets = (inputs.sum(1) > 0).long()
        return {name: TensorDataset(x, y) for name, x, y in zip(("train", "val"), inputs.split(64), targets.split(64))}
"""
ENDS = {  # in the order of the grid
    "0001": ("done", None),
    "0002": ("stopped", None),
    "0003": ("failed", "ValueError: no net is 4 wide"),
    "0005": ("failed", "its process was killed or crashed"),
}


@pytest.fixture(scope="module")
def search_in(ray_session, root, tmp_path_factory):
    """Runs a search of the toy; its context and config."""
    (root / "drawn.py").write_text(textwrap.dedent(DRAWN))

    def search(config, **changes):
        folder = tmp_path_factory.mktemp("stage") / "node"
        folder.mkdir()
        context = StageContext(
            node="search",
            folder=folder,
            root=root,
            task=Task(model="toy:build_model", data="drawn:build_data", metrics=["toy:accuracy"]),
            seed=3,
            resources=Resources(max_concurrent_trials=1),
            inputs={},
            reporter=Unheard(),
            cancel=threading.Event(),
        )
        context, config = replace(context, **changes), TuneConfig.model_validate(config)
        tune(context, config)
        return context, config

    return search


@pytest.fixture(scope="module")
def searched(search_in):
    fail = {"model_args.fail": {"grid": [None, "raise", "kill"]}, "optimizer.lr": {"grid": [0.05, 1e-9]}}
    train = {"epochs": 4, "batch_size": 8}
    return search_in(
        {
            "algorithm": "grid",
            "space": fail,
            "scheduler": {"asha": {"reduction_factor": 2}},
            "train": train,
        }
    )


def again(search, trial):
    context, config = search
    return rerun(context, config, ended_trial(context, config, trial))


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("trial", ENDS)
def test_a_trial_comes_again_as_it_was_to_the_last_bit(searched, trial):
    context, _ = searched
    before = files_of(context.folder.parent)
    result = again(searched, trial)
    assert result.identical
    for ended in (result.then, result.now):
        assert ended.status == ENDS[trial][0]
        assert (ended.reason or "").startswith(ENDS[trial][1] or "")
    assert result.now.epochs == result.then.epochs
    assert {difference for *_, difference in result.differences} <= {0.0}
    assert files_of(context.folder.parent) == before


def test_the_folds_of_a_trial_are_cut_and_trained_again(search_in):
    space = {"optimizer.lr": {"loguniform": [1e-3, 1e-1]}}
    config = {"algorithm": "random", "trials": 2, "space": space, "folds": 3, "train": {"epochs": 2}}
    result = again(search_in(config), "0002")
    assert result.identical
    assert "val_loss_std" in {metric for metric, *_ in result.differences}


def test_a_trial_of_a_half_done_search_can_be_run_again_and_one_under_way_cannot(searched, tmp_path):
    context, config = searched
    journal = (context.folder / "journal.jsonl").read_bytes().splitlines(keepends=True)
    second = next(i for i, line in enumerate(journal) if b'"suggested", "id": "0002"' in line)
    (tmp_path / "journal.jsonl").write_bytes(b"".join(journal[: second + 1]) + b'{"eve')
    half_done = (replace(context, folder=tmp_path), config)
    assert again(half_done, "0001").identical
    assert (tmp_path / "journal.jsonl").read_bytes().endswith(b'\n{"eve')  # another process may be writing it
    with pytest.raises(SpecError, match="'0002' has not ended yet"):
        again(half_done, "0002")


def test_a_trial_that_does_not_exist_is_named_with_the_nearest(searched):
    with pytest.raises(SpecError, match="'0011' does not exist; did you mean '0001'"):
        again(searched, "0011")


@pytest.mark.slow
def test_several_workers_train_a_trial_again(search_in):
    config = {"algorithm": "random", "trials": 1, "space": {"optimizer.lr": 0.01}, "train": {"epochs": 2}}
    result = again(search_in(config, resources=Resources(workers_per_trial=2)), "0001")
    assert (result.then.epochs, result.now.epochs) == (2, 2)
    assert result.identical


def test_what_differs_is_told_by_metric_without_the_times(searched):
    context, config = searched
    then = ended_trial(context, config, "0001")
    other = {name: value + 1 for name, value in then.metrics.items()}
    result = Rerun("search", then, replace(then, metrics=other, history=[(1, other)]))
    assert not result.identical
    told = {metric: difference for metric, *_, difference in result.differences}
    assert told.keys() == {"train_loss", "val_loss", "val_accuracy", "lr"}
    assert all(math.isclose(difference, 1) for difference in told.values())
