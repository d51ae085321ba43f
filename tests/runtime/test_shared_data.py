"""The data of a search: how often it is built, and where it lies."""

import textwrap

import pytest

from heliostat.core.spec import Resources, Task
from heliostat.errors import StageError

pytestmark = pytest.mark.usefixtures("ray_session")

COUNTED = """
    from pathlib import Path

    import torch
    import toy
    from torch.utils.data import TensorDataset

    CALLS = Path(__file__).with_name("calls")
    ADDRESS = 0

    class Watched(TensorDataset):
        def __getitem__(self, index):
            global ADDRESS
            ADDRESS = self.tensors[0].data_ptr()
            return super().__getitem__(index)

    class Closed(TensorDataset):
        def __reduce__(self):
            raise TypeError("an open file")

    def build_data(kind="plain", noise=0.0):
        with CALLS.open("a") as file:
            file.write(f"{kind} {noise}\\n")
        if kind == "broken":
            raise ValueError("no such file")
        cls = {"plain": TensorDataset, "watched": Watched, "closed": Closed}[kind]
        if kind == "watched":
            inputs = torch.randn(32, 4).repeat(2000, 1)
            return {"train": cls(inputs, torch.zeros(len(inputs), dtype=torch.long)), "val": toy.build_data()["val"]}
        return {split: cls(*dataset.tensors) for split, dataset in toy.build_data().items()}

    def is_mapped(outputs, targets):
        for line in open("/proc/self/maps"):
            low, high = (int(end, 16) for end in line.split()[0].split("-"))
            if low <= ADDRESS < high:
                return float("plasma" in line or "/dev/shm" in line)
        return 0.0
"""


@pytest.fixture
def counted(root):
    (root / "counted.py").write_text(textwrap.dedent(COUNTED))
    (root / "calls").unlink(missing_ok=True)
    return Task(model="toy:build_model", data="counted:build_data", metrics=["counted:is_mapped"])


def calls(root):
    return sorted((root / "calls").read_text().splitlines())


def test_data_is_built_once_for_all_trials_that_want_the_same(run, counted, root):
    outcome = run(
        task=counted,
        algorithm="grid",
        space={"data_args.noise": {"grid": [0.0, 0.5]}, "model_args.width": {"grid": [2, 4, 8]}},
        trials=6,
        folds=2,
        resources=Resources(),  # in two processes
    )
    assert [trial.status for trial in outcome.trials] == ["done"] * 6
    assert calls(root) == ["plain 0.0", "plain 0.5"]


def test_a_trial_maps_the_data_instead_of_copying_it(run, counted):
    outcome = run(task=counted, trials=1, space={"data_args.kind": "watched", "batch_size": 64_000})
    assert outcome.best.metrics["val_is_mapped"] == 1.0


def test_data_that_cannot_travel_is_built_once_in_each_process(run, counted, root):
    outcome = run(task=counted, trials=3, space={"data_args.kind": "closed"})
    assert [trial.status for trial in outcome.trials] == ["done"] * 3
    assert calls(root) == ["closed 0.0"] * 2


def test_what_building_the_data_raises_ends_the_search_and_has_its_place(run, counted, root):
    with pytest.raises(StageError, match=r"(?s)the task fails .*: ValueError: no such file\n.*counted.py"):
        run(task=counted, trials=2, space={"data_args.kind": "broken"})
    assert calls(root) == ["broken 0.0"]
