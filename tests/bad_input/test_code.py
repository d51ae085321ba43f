"""The user's code is not there, does not import, or cannot be called as it would be."""

import pytest

from heliostat.core.load import load_pipeline
from heliostat.runner import plan


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"task/model": "build_model"}, "task.model: 'build_model' is not a reference; write it as 'module:attribute'"),
        ({"task/model": "toy.build_model"}, "task.model: 'toy.build_model' is not a reference"),
        ({"task/model": "toi:build_model"}, "task.model: 'toi:build_model': no module named 'toi'; did you mean 'toy'"),
        (
            {"task/model": "toy:bild_model"},
            "task.model: 'toy:bild_model': 'toy' has no 'bild_model'; did you mean 'build_model'?",
        ),
        ({"task/model": "toy:number"}, "task.model: 'toy:number' is of type int, not a function"),
        (
            {"task/loss": "torch.nn.functional:cross_entropyy"},
            "'torch.nn.functional' has no 'cross_entropyy'; did you mean 'cross_entropy'?",
        ),
        (
            {"task/loss": "torch.nn.functionl:cross_entropy"},
            "no module named 'torch.nn.functionl'; did you mean 'torch.nn.functional'?",
        ),
        (
            {"stages/train/config/model_args": {"widht": 3}},
            "stages[1] (train).config.model_args: 'toy:build_model' takes no argument 'widht'; did you mean 'width'?",
        ),
        (
            {"stages/search/config/train/model_args": {"widht": 3}},
            "stages[0] (search).config.train.model_args: 'toy:build_model' takes no argument 'widht'",
        ),
        (
            {"stages/student/config/model_args": {"widht": 3}},
            "stages[3] (student).config.model_args: 'toy:build_model' takes no argument 'widht'",
        ),
        (
            {"stages/train/config/data_args": {"sed": 3}},
            "stages[1] (train).config.data_args: 'toy:build_data' takes no argument 'sed'; did you mean 'seed'?",
        ),
        (
            {"task/data": "toy:reader"},
            "config.train.data_args: 'toy:reader' cannot be called so: missing a required argument: 'path'",
        ),
        (
            {"task/loss": "toy:one"},
            "task.loss: 'toy:one' cannot be called so: too many positional arguments; "
            "it is called with (outputs, targets)",
        ),
        ({"task/loss": "toy:with_more"}, "task.loss: 'toy:with_more' cannot be called so: missing a required argument"),
        (
            {"task/metrics": ["toy:accuracy", "toy:one"]},
            "task.metrics[1]: 'toy:one' cannot be called so: too many positional arguments",
        ),
        ({"task/metrics": ["toy:acuracy"]}, "task.metrics[0]: 'toy:acuracy': 'toy' has no 'acuracy'; did you mean"),
        ({"task/metrics": ["toy:accuracy"] * 2}, "task.metrics: two metrics would be called 'accuracy'"),
        (
            {"task/train_fn": "toy:one"},
            "task.train_fn: 'toy:one' cannot be called so: too many positional arguments; "
            "it is called with (context, config)",
        ),
        ({"task/train_fn": "toy:on"}, "task.train_fn: 'toy:on': 'toy' has no 'on'; did you mean 'one'?"),
    ],
)
def test_code_that_is_not_there_or_cannot_be_called_so_is_refused(refusal, changes, expected):
    assert expected in str(refusal(changes))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import numpyy\n", "ModuleNotFoundError: No module named 'numpyy'"),
        ("from toy import nothing\n", "ImportError: cannot import name 'nothing' from 'toy'"),
        ("def build_model(:\n", "SyntaxError: invalid syntax (broken.py, line 1)"),
        ("1 / 0\n", "ZeroDivisionError: division by zero"),
        ("assert False, 'needs a GPU'\n", "AssertionError: needs a GPU"),
        ("raise SystemExit(0)\n", "SystemExit: 0"),
    ],
    ids=["missing-dependency", "missing-name", "syntax", "exception", "assertion", "exit"],
)
def test_a_module_that_does_not_import_is_refused_with_the_real_reason(toy, refusal, source, reason):
    (toy.folder / "broken.py").write_text(source)
    text = str(refusal({"task/model": "broken:build_model"}))
    assert f"task.model: 'broken:build_model': module 'broken' does not import: {reason}" in text


def test_a_loss_class_is_made_with_its_defaults_so_it_needs_none(toy, change):
    for loss in ("torch.nn:CrossEntropyLoss", "torch.nn:GaussianNLLLoss"):
        plan(load_pipeline(toy.write(change(toy.document, {"task/loss": loss}))))
