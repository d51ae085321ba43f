"""What no parameters can help ends a search with its first trial, and what some can does not."""

import json
import textwrap

import pytest

from heliostat.core.objective import Objectives
from heliostat.core.spec import Resources, Task
from heliostat.errors import StageError
from heliostat.training.config import TrainConfig

pytestmark = pytest.mark.usefixtures("ray_session")

MODULE = """
    import os

    import torch
    from torch import nn
    from torch.utils.data import TensorDataset

    from toy import build_data, build_model


    def needs_a_package(width=4):
        import a_package_that_is_missing


    def no_data():
        raise FileNotFoundError("no digits here")


    def samples_of_dicts():
        rows = [({"image": torch.ones(4)}, 1)] * 8
        return {"train": rows, "val": rows}


    def gives_a_dict(width=4):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(4, 2)

            def forward(self, inputs):
                return {"logits": self.layer(inputs)}

        return Net()


    def raises(outputs, targets):
        raise ZeroDivisionError("no such class")


    def narrow_only(width=4):
        if width > 2:
            raise ValueError(f"{width} is too wide")
        return build_model(width)


    def loop(context, config):
        context.report({"train_loss": 1.0})
"""


@pytest.fixture(scope="module", autouse=True)
def module(root):
    (root / "broken.py").write_text(textwrap.dedent(MODULE))


@pytest.fixture
def broken(task):
    return lambda **changes: Task(**task.model_dump() | changes)


def _suggested(folder):
    lines = map(json.loads, (folder / "journal.jsonl").read_text().splitlines())
    return [line["event"] for line in lines]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "broken:needs_a_package"}, r"ModuleNotFoundError: No module named 'a_package.*broken\.py"),
        pytest.param({"data": "broken:no_data"}, "FileNotFoundError: no digits here", marks=pytest.mark.slow),
        ({"data": "broken:samples_of_dicts"}, r"inputs: \{image: float32 \(4,\)\}; they must be one tensor"),
        pytest.param(
            {"model": "broken:gives_a_dict"}, r"the model gives \{logits: float32 \(4, 2\)\}", marks=pytest.mark.slow
        ),
        ({"metrics": ["broken:raises"]}, "ZeroDivisionError: no such class"),
        pytest.param(
            {"metrics": ["toy:not_a_number"]}, "val_not_a_number is not a number at epoch 1", marks=pytest.mark.slow
        ),
        ({"train_fn": "broken:loop"}, "nothing reports 'val_loss'; what is reported: .*train_loss"),
    ],
)
def test_a_task_that_fails_at_every_point_ends_the_search_in_its_first_trial(
    run, broken, reporter, tmp_path, changes, reason
):
    with pytest.raises(StageError, match=rf"(?s)the task fails whatever .* no other trial is run: .*{reason}"):
        run(task=broken(**changes), trials=24, objectives=_objectives(changes), train=TrainConfig(epochs=50))
    assert reporter.started == ["0001"]
    assert [status for status, _ in reporter.ended.values()] == ["failed"]
    assert "ended" not in _suggested(tmp_path)


def _objectives(changes):
    own = "toy:not_a_number" in changes.get("metrics", ())
    return Objectives.of({"val_not_a_number": "max"} if own else {"val_loss": "min"})


def test_what_some_parameters_can_help_fails_its_trials_alone(run, broken, reporter):
    outcome = run(
        task=broken(model="broken:narrow_only"), algorithm="grid", space={"model_args.width": {"grid": [4, 2, 8]}}
    )
    assert [trial.status for trial in outcome.trials] == ["failed", "done", "failed"]
    assert outcome.trials[0].reason.startswith("ValueError: 4 is too wide")


def test_a_search_goes_on_with_all_its_trials_once_the_task_is_repaired(run, broken, root, tmp_path, reporter):
    (root / "repaired.py").write_text(
        "def build_model(width=4):\n    import not_there_yet\n    return not_there_yet.make(width)\n"
    )
    task = broken(model="repaired:build_model")
    with pytest.raises(StageError, match="No module named 'not_there_yet'"):
        run(task=task, trials=3)
    (root / "not_there_yet.py").write_text("from toy import build_model as make\n")
    outcome = run(task=task, trials=3)
    assert [trial.status for trial in outcome.trials] == ["done"] * 3


def test_a_process_that_dies_of_another_point_leaves_the_trial_its_own_reason(run, tmp_path):
    space = {"model_args.fail": {"grid": ["raise", "kill"]}, "model_args.width": 5}
    with pytest.raises(StageError, match="1 of 2: ValueError: no net is 5 wide"):
        run(algorithm="grid", space=space)


@pytest.mark.slow
def test_trials_of_several_workers_end_once_too(run, broken, reporter):
    with pytest.raises(StageError, match="the task fails whatever the parameters are"):
        run(
            task=broken(data="broken:no_data"),
            trials=6,
            resources=Resources(workers_per_trial=2, max_concurrent_trials=1),
            space={"optimizer.lr": {"grid": [0.1, 0.01]}},
            algorithm="grid",
        )
    assert reporter.started == ["0001"]
