"""Search spaces that say nothing, or what the train config would refuse in the middle of a search."""

from typing import Any

import pytest

from heliostat.core.load import load_pipeline
from heliostat.runner import plan


def space(**dimensions: Any) -> dict[str, Any]:
    """The change that makes these the search space; `__` stands for the dot of a path."""
    return {"stages/search/config/space": {path.replace("__", "."): d for path, d in dimensions.items()}}


def objectives(*written: Any) -> dict[str, Any]:
    return {"stages/search/config/objectives": list(written)}


def after(*passes: Any) -> dict[str, Any]:
    """The change that puts each trial's model through these passes."""
    return {"stages/search/config/evaluate_after": list(passes)}


SEARCH = "stages[0] (search).config.space"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (space(), f"{SEARCH}: nothing to search; name at least one parameter"),
        (
            space(optimizer__lrr={"uniform": [0.1, 1]}),
            f"{SEARCH}.optimizer.lrr: not a field of the train config: unknown field 'lrr'; did you mean 'lr'?",
        ),
        (space(epochs__x={"choice": [1]}), f"{SEARCH}.epochs.x: not a field of the train config: epochs has no fields"),
        (space(model_args={"choice": [1]}), "name what is to vary inside it, such as model_args.width"),
        (
            space(model_args__widht={"choice": [8]}),
            f"{SEARCH}.model_args.widht: 'toy:build_model' takes no argument 'widht'; did you mean 'width'?",
        ),
        (
            space(data_args__sed={"choice": [8]}),
            f"{SEARCH}.data_args.sed: 'toy:build_data' takes no argument 'sed'; did you mean 'seed'?",
        ),
        (
            space(optimizer__lr={"logunifrom": [0.1, 1]}),
            f"{SEARCH}.optimizer.lr: unknown dimension 'logunifrom'; did you mean 'loguniform'?",
        ),
        (space(optimizer__lr=[0.1, 1]), f"{SEARCH}.optimizer.lr: [0.1, 1] is a list; write {{choice: [0.1, 1]}}"),
        (
            space(optimizer__lr={"uniform": [1, 0.1]}),
            f"{SEARCH}.optimizer.lr.uniform: the range [1, 0.1] is reversed",
        ),
        (
            space(optimizer__lr={"uniform": [0.1, 0.1]}),
            f"{SEARCH}.optimizer.lr.uniform: the range [0.1, 0.1] is empty",
        ),
        (space(optimizer__lr={"uniform": [0.1]}), f"{SEARCH}.optimizer.lr.uniform: [0.1] is not a range"),
        (space(optimizer__lr={"uniform": ["a", 1]}), f"{SEARCH}.optimizer.lr.uniform: 'a' is not a number"),
        (space(batch_size={"randint": [1, 2.5]}), f"{SEARCH}.batch_size.randint: 2.5 is not a whole number"),
        (space(batch_size={"choice": []}), f"{SEARCH}.batch_size.choice: [] offers nothing to choose from"),
        (
            space(optimizer__lr={"loguniform": [0, 0.1]}),
            f"{SEARCH}.optimizer.lr.loguniform: the logarithm needs a low end above zero, not 0",
        ),
        (
            space(optimizer__lr={"normal": [0.1, 0.05]}),
            f"{SEARCH}.optimizer.lr: input should be greater than 0, not -0.1",
        ),
        (space(batch_size={"choice": [32, -1]}), f"{SEARCH}.batch_size: input should be greater than or equal to 1"),
        (
            space(batch_size={"randint": [-5, 64]}),
            f"{SEARCH}.batch_size: input should be greater than or equal to 1, not -5",
        ),
        (
            space(batch_size={"uniform": [16, 64]}),
            f"{SEARCH}.batch_size: input should be a valid integer, not 16.0",
        ),
        (
            space(optimizer__lr={"uniform": [-0.5, 1]}),
            f"{SEARCH}.optimizer.lr: input should be greater than 0, not -0.5",
        ),
        (
            space(optimizer__name={"choice": ["sgd", "adamm"]}),
            f"{SEARCH}.optimizer.name: unknown optimizer 'adamm'; did you mean 'adam'?",
        ),
        (
            space(optimizer__name="adamm", batch_size={"choice": [16]}),
            f"{SEARCH}.optimizer.name: unknown optimizer 'adamm'",
        ),
        (
            space(optimizer__name={"choice": ["adam", {"value": "sgd", "space": {"optimizer.momentun": 0.9}}]}),
            f"{SEARCH}.optimizer.momentun: not a field of the train config: unknown field 'momentun'; did you mean",
        ),
        (
            space(optimizer__name={"choice": ["adam", {"value": "adamw", "space": {"optimizer.momentum": 0.9}}]}),
            f"{SEARCH}.optimizer: adamw takes no 'momentum'",
        ),
        (
            space(optimizer__name={"choice": ["adam", {"value": "sgd", "spce": {"optimizer.momentum": 0.9}}]}),
            f"{SEARCH}.optimizer.name.choice[1]: unknown field 'spce' beside 'value'; did you mean 'space'?",
        ),
        (
            {"stages/search/config/algorithm": "grid", "stages/search/config/trials": ...},
            f"{SEARCH}.optimizer.lr: loguniform has no end of values; a grid needs `grid`, `choice`, `randint`",
        ),
        (
            {"stages/search/config/algorithm": "grid", **space(batch_size={"choice": [16, 32]})},
            "stages[0] (search).config.trials: a grid runs each of its 2 points, not 4; leave it out",
        ),
        (
            {
                "stages/search/config/algorithm": "grid",
                "stages/search/config/trials": ...,
                **space(batch_size={"randint": [1, 10**6]}, model_args__width={"randint": [1, 10**6]}),
            },
            f"{SEARCH}: a grid of 999,998,000,001 points is more than config.max_grid, 500; raise that if it is meant",
        ),
        (
            {"stages/search/config/folds": 1},
            "stages[0] (search).config.folds: input should be greater than or equal to 2, not 1",
        ),
        (
            {"stages/search/config/folds": 3, "stages/search/resources": {"workers_per_trial": 2}},
            "stages[0] (search).config.folds: one worker trains the folds of a trial in turn; "
            "set resources.workers_per_trial to 1",
        ),
        (
            {"stages/search/config/folds": 3, "task/train_fn": "toy:loop"},
            "stages[0] (search).config.folds: task.train_fn reads its data itself",
        ),
        (
            {"stages/search/config/stop_when": {"val_acuracy": 0.9}},
            "config.stop_when.val_acuracy: nobody reports 'val_acuracy'; did you mean 'val_accuracy'?",
        ),
        (
            {"stages/search/config/stop_when": {"test_accuracy": 0.9}},
            "config.stop_when.test_accuracy: 'test_accuracy' is of the test split, which nothing may choose by",
        ),
        (
            objectives({"val_accuracy": "maxx"}),
            "config.objectives[0].mode: 'maxx' is not one of max, min; did you mean 'max'?",
        ),
        (objectives("val_acuracy"), "config.objectives[0].metric: nobody reports 'val_acuracy'; did you mean"),
        (objectives("val_loss", {"latency": "min"}), "nobody reports 'latency'; did you mean 'latency_ms'?"),
        (objectives("test_loss"), "config.objectives[0].metric: 'test_loss' is of the test split"),
        (objectives("val_loss", "val_loss"), "config.objectives[1].metric: 'val_loss' is there twice"),
        (objectives(), "stages[0] (search).config.objectives: empty; name at least one"),
        (
            objectives("val_loss") | {"stages/search/config/objective": {"metric": "val_loss"}},
            "config.objectives: there is config.objective already; leave one of them out",
        ),
        (
            objectives("val_accuracy", "latency_ms"),
            "config.algorithm: bayesian takes one objective, not 2; of several take grid, optuna_tpe, random",
        ),
        (
            {"stages/search/config/start_from": [{"optimizer.lr": 0.5, "model_args.width": 8}]},
            "config.start_from[0].optimizer.lr: 0.5 is not in the space",
        ),
        (
            {"stages/search/config/start_from": [{"optimizer.lr": 0.01, "model_args.width": 8, "optimizer.lrr": 1}]},
            "config.start_from[0].optimizer.lrr: not in the space; did you mean 'optimizer.lr'?",
        ),
        (
            {"stages/search/config/start_from": [{"optimizer.lr": 0.01}]},
            "config.start_from[0].model_args.width: missing",
        ),
        (
            {"stages/search/config/limits": {"size": 0.5}},
            "config.limits.size: nobody reports 'size'; did you mean 'size_mb'?",
        ),
        ({"stages/search/config/limits": {"size_mb": "0.5"}}, "config.limits.size_mb: input should be a valid number"),
        (
            {"stages/search/config/limits": {"test_accuracy": 0.5}},
            "config.limits.test_accuracy: 'test_accuracy' is of the test split, which nothing may choose by",
        ),
        (
            after({"quantise": {}}),
            "config.evaluate_after[0].quantise: unknown field; did you mean 'quantize'?",
        ),
        (after({"quantize": {"methd": "static"}}), "evaluate_after[0].quantize.methd: unknown field; did you mean"),
        (after({"prune": {"sparsity": 1.5}}), "evaluate_after[0].prune.sparsity: input should be less than 1, not 1.5"),
        (after({"prune": {"method": "magnitude", "importance": "taylor"}}), "magnitude takes no 'importance'"),
        (after({}), "config.evaluate_after[0]: name one pass, prune or quantize; the next one is the next of the list"),
        (after({"prune": {}, "quantize": {}}), "config.evaluate_after[0]: name one pass, prune or quantize"),
        (
            after({"quantize": {}}, {"prune": {}}),
            "config.evaluate_after[1].prune: what 'quantize' makes cannot be compressed further; put it last",
        ),
        (
            after({"prune": {"optimizer": {"name": "toy:one"}, "finetune_epochs": 1}}),
            "config.evaluate_after[0].prune.optimizer: 'toy:one' takes no argument 'lr'",
        ),
        (
            after({"quantize": {"max_drop": {"val_acuracy": 0.1}}}),
            "evaluate_after[0].quantize.max_drop.val_acuracy: nobody reports 'val_acuracy'; did you mean",
        ),
        (
            after({"quantize": {}}) | {"stages/search/resources": {"workers_per_trial": 2}},
            "config.evaluate_after: one worker trains and measures a trial's model; set resources.workers_per_trial",
        ),
        (
            after({"quantize": {}}) | {"stages/search/config/folds": 3},
            "config.evaluate_after: a trial with folds trains as many models as those; leave config.folds out",
        ),
        (
            after({"quantize": {}}) | {"task/train_fn": "toy:loop"},
            "config.evaluate_after: task.train_fn keeps its model to itself until it ends",
        ),
        (
            {"stages/search/config/limits": {"size_mb": 0.5}, "stages/search/config/folds": 3},
            "config.limits.size_mb: a trial with folds trains as many models as those; leave config.folds out",
        ),
        (
            objectives("val_accuracy", "size_mb") | {"stages/search/config/folds": 3},
            "config.objectives: a trial with folds trains as many models as those; leave config.folds out",
        ),
        (
            {
                "stages/search/config/stop_when": {"latency_ms": 1.0},
                "stages/search/resources": {"workers_per_trial": 2},
            },
            "config.stop_when.latency_ms: one worker trains and measures a trial's model",
        ),
        (
            {"stages/search/config/wall_time_s": 0},
            "stages[0] (search).config.wall_time_s: input should be greater than 0, not 0",
        ),
        (
            {"stages/search/config/scheduler": "medain"},
            "stages[0] (search).config.scheduler: unknown scheduler 'medain'; did you mean 'median'?",
        ),
        (
            {"stages/search/config/scheduler": {"medain": {}}},
            "stages[0] (search).config.scheduler.medain: unknown field; did you mean 'median'?",
        ),
        (
            {"stages/search/config/scheduler": {"median": {"min_trial": 3}}},
            "stages[0] (search).config.scheduler.median.min_trial: unknown field; did you mean 'min_trials'?",
        ),
        (
            {"stages/search/config/scheduler": {"median": {}, "asha": {}}},
            "stages[0] (search).config.scheduler: name one of asha and median, or `none`",
        ),
        (
            {"stages/search/config/scheduler": {}},
            "stages[0] (search).config.scheduler: name one of asha and median, or `none`",
        ),
        (
            {"stages/search/config/algorithm": "bayes"},
            "stages[0] (search).config.algorithm: unknown algorithm 'bayes'; did you mean 'bayesian'?",
        ),
    ],
)
def test_a_faulty_search_space_is_refused(refusal, changes, expected):
    assert expected in str(refusal(changes))


def test_every_end_of_a_conditional_space_is_tried_but_not_what_can_never_meet(toy, change):
    options = ["adam", {"value": "sgd", "space": {"optimizer.momentum": {"uniform": [0.0, 0.99]}}}]
    plan(load_pipeline(toy.write(change(toy.document, space(optimizer__name={"choice": options})))))


def test_a_large_grid_that_is_meant_is_planned(toy, change):
    grid = {"stages/search/config/algorithm": "grid", "stages/search/config/trials": ...}
    large = space(batch_size={"randint": [1, 601]}) | {"stages/search/config/max_grid": 600}
    planned = plan(load_pipeline(toy.write(change(toy.document, grid | large))))
    assert planned.node("search").explained["algorithm"] == "grid, every one of 600 points"
