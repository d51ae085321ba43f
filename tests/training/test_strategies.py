"""Every strategy trains the same curve and the same model as one process, and takes up what others left."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from heliostat.errors import SpecError
from heliostat.training.config import PpConfig
from heliostat.training.strategies.fsdp import units
from heliostat.training.strategies.pp import chain_of, cut_points

WORKER = Path(__file__).with_name("strategy_worker.py")
PAIRS = ["fsdp", "tp", "pp", "gpipe", "interleaved", "tp-by-plan", "fsdp-by-class"]
FOURS = ["fsdp", "tp", "dp-tp", "dp-pp", "pp"]


def start(folder: Path, name: str, size: int, *end: str) -> None:
    """Let so many workers train."""
    workers = [
        subprocess.Popen([sys.executable, str(WORKER), name, str(rank), str(size), str(folder), *end])
        for rank in range(size)
    ]
    try:
        assert [worker.wait(timeout=300) for worker in workers] == [0] * len(workers)
    finally:
        for worker in workers:
            worker.kill()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("strategies")

    def results(name: str, size: int) -> dict[str, Any]:
        file = folder / f"{name}-{size}.pt"
        if not file.exists():
            start(folder, name, size)
        found: dict[str, Any] = torch.load(file, weights_only=True)
        return found

    return results


def assert_same_curve(one: dict[str, Any], other: dict[str, Any]) -> None:
    """20 steps and one: after each, the loss and the metrics over the whole validation split; and the saved model."""
    assert len(one["validations"]) == len(other["validations"]) == 21
    for row, expected in zip(one["validations"] + one["history"], other["validations"] + other["history"]):
        for name in {"val_loss", "val_accuracy", "val_total", "train_loss"} & set(row):
            assert row[name] == pytest.approx(expected[name], abs=1e-4), name
    assert one["epoch"] == other["epoch"]
    assert list(one["state"]) == list(other["state"])
    for name, tensor in other["state"].items():
        torch.testing.assert_close(one["state"][name], tensor, rtol=0, atol=1e-4)


def assert_parity(trained: Callable[[str, int], dict[str, Any]], name: str, size: int) -> None:
    several, single = trained(name, size), trained("single", 1)
    for model in {"mlp", "cnn", "normed", "transformer", "attention", "heads"} & set(several):
        assert_same_curve(several[model], single[model])


@pytest.mark.parametrize("name", ["fsdp", "tp", "pp"])
def test_a_strategy_trains_the_curve_and_the_model_of_one_process(trained: Any, name: str) -> None:
    assert_parity(trained, name, 2)


def test_auto_splits_a_model_that_is_too_large_for_a_worker_and_trains_the_same_curve(trained: Any) -> None:
    assert_parity(trained, "auto", 2)
    taken = {name: found["taken"] for name, found in trained("auto", 2).items() if not name.startswith("own")}
    assert taken == {"mlp": "fsdp", "cnn": "pp", "transformer": "pp"}


def test_auto_also_splits_the_model_of_a_users_own_loop(trained: Any) -> None:
    assert_same_own_loop(trained, "auto", 2)
    assert trained("auto", 2)["own_loop"]["taken"] == "tp"  # the largest unit alone is too large to be gathered


@pytest.mark.parametrize("name", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp", "tp"])
def test_a_users_own_step_trains_the_same_curve(trained: Any, name: str) -> None:
    assert_same_curve(trained(name, 2)["own_step"], trained("single", 1)["own_step"])


def assert_same_own_loop(trained: Callable[[str, int], dict[str, Any]], name: str, size: int) -> None:
    several, single = trained(name, size), trained("single", 1)["own_loop"]
    for loop in ("own_loop", "own_loop_resumed"):
        for row, expected in zip(several[loop]["history"], single["history"], strict=True):
            assert row["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-4)
        torch.testing.assert_close(several[loop]["state"], single["state"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["fsdp", "tp"])
def test_a_users_own_loop_trains_the_same_curve_and_goes_on_from_its_checkpoint(trained: Any, name: str) -> None:
    assert_same_own_loop(trained, name, 2)


@pytest.mark.parametrize("name", ["fsdp", "tp"])
def test_an_optimizer_of_the_model_as_it_was_before_is_refused(trained: Any, name: str) -> None:
    assert "make the optimizer after it" in trained(name, 2)["early_optimizer"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tp", "dp-tp"])
def test_so_does_a_users_own_loop_on_four_workers(trained: Any, name: str) -> None:
    assert_same_own_loop(trained, name, 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tp", "dp-tp"])
def test_so_does_a_users_own_step_with_the_heads_of_attention_dealt_out_to_four_workers(
    trained: Any, name: str
) -> None:
    assert_same_curve(trained(name, 4)["own_step_heads"], trained("single", 1)["own_step_heads"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", *PAIRS[3:]])
def test_so_does_every_form_of_it(trained: Any, name: str) -> None:
    assert_parity(trained, name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOURS)
def test_so_do_four_workers_and_two_dimensional_meshes(trained: Any, name: str) -> None:
    assert_parity(trained, name, 4)


@pytest.mark.parametrize("name", ["fsdp", "tp", "pp"])
def test_an_interrupted_run_equals_an_uninterrupted_one_bit_for_bit(trained: Any, name: str) -> None:
    results = trained(name, 2)
    resumed, uninterrupted = results["resumed"], results["uninterrupted"]
    assert resumed["validations"] == uninterrupted["validations"]
    assert resumed["epoch"] == uninterrupted["epoch"]
    assert all(torch.equal(resumed["state"][key], tensor) for key, tensor in uninterrupted["state"].items())


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4)])
@pytest.mark.parametrize("name", ["fsdp", "tp", "pp"])
def test_what_some_workers_left_others_take_up_and_train_the_same_curve(
    trained: Any, tmp_path: Path, name: str, before: int, after: int
) -> None:
    start(tmp_path, name, before, "begun")
    killed_while_writing = tmp_path / f"begun-{name}-{before}" / "epoch-00001.0123abcd.tmp"
    killed_while_writing.mkdir()
    start(tmp_path, name, after, str(before))
    assert not killed_while_writing.exists()
    resumed = torch.load(tmp_path / f"{name}-{before}-to-{after}.pt", weights_only=True)
    assert_same_curve(resumed, trained("single", 1)["transformer"])


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + self.b(self.a(inputs))


def test_a_model_that_is_no_chain_is_not_cut() -> None:
    with pytest.raises(SpecError, match="pp cannot cut Residual: its modules, called one after another"):
        chain_of(Residual(), torch.ones(1, 4))


def test_a_chain_is_cut_where_the_parts_have_about_as_many_parameters() -> None:
    sizes = [(4, 40), (40, 4), (4, 4), (4, 4), (4, 40)]
    chain = [(str(number), nn.Linear(*size)) for number, size in enumerate(sizes)]
    assert cut_points(chain, PpConfig(), num_stages=2) == [(0, 2), (2, 5)]
    assert cut_points(chain, PpConfig(split=("1", "4")), num_stages=3) == [(0, 1), (1, 4), (4, 5)]
    with pytest.raises(SpecError, match=r"strategy\.pp\.split: 2 stages, but the workers need 4"):
        cut_points(chain, PpConfig(split=("3",)), num_stages=4)


def test_batch_norm_is_not_trained_in_microbatches() -> None:
    with pytest.raises(SpecError, match="statistics of microbatches"):
        chain_of(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), torch.ones(1, 2))


def test_units_are_the_smallest_modules_of_a_size_or_those_of_a_class() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 2)), nn.ModuleList([nn.Linear(10, 10)]))
    assert list(units(model, 110)) == [model[0][0], model[1][0]]
    assert list(units(model, 130)) == [model[0]]
    assert len(list(units(model, "Linear"))) == 3
    with pytest.raises(SpecError, match="no 'Linea'; did you mean 'Linear'"):
        list(units(model, "Linea"))
