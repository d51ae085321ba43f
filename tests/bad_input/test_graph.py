"""Stages that do not fit together, metrics that nobody reports, and what can never fit the machine."""

import os

import pytest

from heliostat.core.load import load_pipeline
from heliostat.errors import ResourceError
from heliostat.runner import check_fits_here, plan, run


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"stages/train/uses": "trian"}, "stages[1] (train).uses: unknown stage kind 'trian'; did you mean 'train'?"),
        (
            {"stages/train/uses": "zzz"},
            "stages[1] (train).uses: unknown stage kind 'zzz'; known: compress, distill, export, factorize, nas,",
        ),
        (
            {"stages/train/uses": "toy:build_model"},
            "stages[1] (train).uses: 'toy:build_model' is not a stage; put @stage(...) over the function",
        ),
        ({"stages/train/uses": "toi:stage"}, "stages[1] (train).uses: no module named 'toi'; did you mean 'toy'?"),
        ({"stages/student/name": "prune"}, "stages[3] (prune): duplicate stage name 'prune'; stages[2] has it"),
        (
            {"stages/train/inputs": {"params": "prune"}},
            "stages[1] (train).inputs.params: the stage 'prune' comes later; known: search",
        ),
        ({"stages/train/inputs": {"params": "train"}}, "stages[1] (train).inputs.params: 'train' is this stage itself"),
        (
            {"stages/prune/inputs": {"model": "trian"}},
            "stages[2] (prune).inputs.model: the stage 'trian' does not exist; did you mean 'train'?",
        ),
        (
            {"stages/prune/inputs": {"model": "search"}},
            "stages[2] (prune).inputs.model: 'search' makes 'params', but the input takes 'model'",
        ),
        (
            {"stages/best/inputs/candidates": ["train", "search"]},
            "stages[5] (best).inputs.candidates: 'search' makes 'params', but the input takes 'model'",
        ),
        (
            {"stages/prune/inputs": {"modle": "train"}},
            "stages[2] (prune).inputs.modle: prune has no input 'modle'; did you mean 'model'?",
        ),
        ({"stages/int8/inputs": {"model": []}}, "stages[4] (int8).inputs.model: missing; quantize needs the name"),
        (
            {"stages/int8/inputs": {"model": ["train", "prune", "train"]}},
            "stages[4] (int8).inputs.model: 'train' is there twice",
        ),
        (
            {"stages/prune/matrix": {"sparsity": [0.5, 0.25, 0.5]}},
            "stages[2] (prune): prune[sparsity=0.5] and prune[sparsity=0.5] are the same",
        ),
        (
            {"stages/prune/matrix": {"batch_size": [8], "sparsity": [0, 0.0]}},
            "prune[batch_size=8,sparsity=0] and prune[batch_size=8,sparsity=0.0] are the same",
        ),
    ],
)
def test_a_faulty_graph_is_refused(refusal, changes, expected):
    assert expected in str(refusal(changes))


@pytest.mark.parametrize(
    ("uses", "expected"),
    [
        ("prune", "inputs.model: what 'quantize' makes cannot be trained further; name the stage before it"),
        ("quantize", "inputs.model: it is quantized already; name the stage before it"),
        ("export", "inputs.model: what 'quantize' makes is exported already; name the stage before it"),
    ],
)
def test_a_quantized_model_goes_into_nothing_that_cannot_use_it(toy, refusal, uses, expected):
    more = [*toy.document["stages"], {"name": "more", "uses": uses, "inputs": {"model": "int8"}}]
    assert f"stages[6] (more).{expected}" in str(refusal({"stages": more}))


def test_more_workers_than_the_machine_can_hold_are_refused_before_ray_starts(toy, change):
    many = (os.cpu_count() or 1) + 1
    pipeline = load_pipeline(
        toy.write(change(toy.document, {"stages/train/resources": {"workers": many, "cpus_per_worker": 1}}))
    )
    with pytest.raises(ResourceError, match=rf"train: needs {many} CPUs at once; this machine has {many - 1} CPUs"):
        check_fits_here(plan(pipeline))
    with pytest.raises(ResourceError, match=r"Lower stages\.train\.resources, or run on a larger cluster"):
        run(pipeline)
    assert ResourceError.exit_code == 3


def test_a_trial_that_can_never_fit_is_refused(toy, change):
    resources = {"workers_per_trial": 2, "cpus_per_worker": os.cpu_count() or 1}
    pipeline = load_pipeline(toy.write(change(toy.document, {"stages/search/resources": resources})))
    with pytest.raises(ResourceError, match="search: needs"):
        check_fits_here(plan(pipeline))
    with pytest.raises(ResourceError, match="search: needs"):
        run(pipeline)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"stages/best/config": {"max_drop": {"val_acc": 0.1}}},
            "stages[5] (best).config.max_drop.val_acc: nobody reports 'val_acc'; did you mean 'val_accuracy'?",
        ),
        (
            {"stages/best/config": {"max_drop": {"train_loss": 0.1}}},
            "stages[5] (best).config.max_drop.train_loss: nobody reports 'train_loss'",
        ),
        (
            {"stages/best/config": {"max_drop": {"test_accuracy": 0.1}}},
            "max_drop.test_accuracy: 'test_accuracy' is of the test split, which nothing may choose by; "
            "use val_accuracy",
        ),
        (
            {"stages/best/config": {"max_drop": {"val_accuracy": -0.1}}},
            "stages[5] (best).config.max_drop.val_accuracy: input should be greater than or equal to 0, not -0.1",
        ),
        (
            {"stages/best/config": {"minimize": ["size_mb", "latency"]}},
            "stages[5] (best).config.minimize[1]: no model is measured for 'latency'; did you mean 'latency_ms'?",
        ),
        ({"stages/best/config": {"minimize": []}}, "stages[5] (best).config.minimize: empty; name at least one"),
        (
            {"stages/search/config/objective": {"metric": "val_acuracy"}},
            "stages[0] (search).config.objective.metric: nobody reports 'val_acuracy'; did you mean 'val_accuracy'?",
        ),
        (
            {"stages/search/config/objective": {"metric": "test_loss"}},
            "config.objective.metric: 'test_loss' is of the test split, which nothing may choose by; use val_loss",
        ),
        (
            {"stages/train/config/monitor": "val_acc"},
            "stages[1] (train).config.monitor: nobody reports 'val_acc'; did you mean 'val_accuracy'?",
        ),
        (
            {"task/metrics": [{"reference": "toy:accuracy", "mode": "maximum"}]},
            "task.metrics[0].mode: 'maximum' is not one of max, min; did you mean 'max'?",
        ),
    ],
)
def test_a_metric_that_nobody_reports_or_may_choose_by_is_refused(refusal, changes, expected):
    assert expected in str(refusal(changes))
