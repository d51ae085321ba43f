"""The same runs with one, two and three gloo workers."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

Results = dict[int, dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("parity")
    script = Path(__file__).with_name("parity_worker.py")
    workers = [
        subprocess.Popen([sys.executable, str(script), str(rank), str(size), str(folder)])
        for size in (1, 2, 3)
        for rank in range(size)
    ]
    try:
        assert [worker.wait(timeout=300) for worker in workers] == [0] * len(workers)
    finally:
        for worker in workers:
            worker.kill()
    return {size: torch.load(folder / f"{size}.pt", weights_only=True) for size in (1, 2, 3)}


@pytest.mark.parametrize("size", [2, 3])
def test_every_step_equals_that_of_one_worker_whatever_the_last_batch_leaves(results: Results, size: int) -> None:
    one, several = results[1]["curve"], results[size]["curve"]
    assert one["weights"].shape[0] == 22
    torch.testing.assert_close(several["weights"], one["weights"], rtol=0, atol=1e-5)
    for row, expected in zip(several["history"], one["history"]):
        assert row["train_loss"] == pytest.approx(expected["train_loss"], abs=1e-5)
        assert row["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-5)
        assert row["val_accuracy"] == expected["val_accuracy"]


@pytest.mark.parametrize("size", [2, 3])
def test_accumulation_and_clipping_do_not_depend_on_the_number_of_workers(results: Results, size: int) -> None:
    torch.testing.assert_close(
        results[size]["in_parts"]["weights"], results[1]["in_parts"]["weights"], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", ["own", "torch", "own_step"])
def test_a_loss_that_divides_by_its_weight_is_that_of_the_global_batch(results: Results, size: int, name: str) -> None:
    """Whichever workers have its tokens, and in how many parts they compute."""
    one, several = results[1]["weighted"][name], results[size]["weighted"][name]
    for row, expected in zip(several["history"], one["history"], strict=True):
        assert row["train_loss"] == pytest.approx(expected["train_loss"], abs=1e-5)
        assert row["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-5)
    torch.testing.assert_close(several["state"], one["state"], rtol=0, atol=1e-5)
    assert several["history"][-1]["val_loss"] == pytest.approx(several["alone"], abs=1e-6)


@pytest.mark.parametrize("size", [2, 3])
def test_the_saved_model_has_the_users_names(results: Results, size: int) -> None:
    assert list(results[size]["curve"]["state"]) == ["0.weight", "0.bias", "2.weight", "2.bias"]


@pytest.mark.parametrize("size", [2, 3])
def test_metrics_are_exact_under_any_world_size(results: Results, size: int) -> None:
    assert results[size]["exact_metrics"] == pytest.approx(results[1]["exact_metrics"], rel=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_model_that_is_evaluated_is_the_model_that_is_saved(results: Results, size: int) -> None:
    for figures in results[size]["batch_norm"].values():
        assert figures["during"] == pytest.approx(figures["after"], rel=1e-6)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", ["whole", "in_parts"])
def test_batch_norm_takes_its_statistics_of_all_workers(results: Results, size: int, name: str) -> None:
    one, several = results[1]["batch_norm"][name], results[size]["batch_norm"][name]
    torch.testing.assert_close(several["state"], one["state"], rtol=1e-4, atol=1e-4)
    for row, expected in zip(several["history"], one["history"], strict=True):
        assert row["train_loss"] == pytest.approx(expected["train_loss"], abs=1e-4)
        assert row["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-4)


@pytest.mark.parametrize("size", [2, 3])
def test_a_loss_with_parameters_is_trained_by_all_workers(results: Results, size: int) -> None:
    one, several = results[1]["trained_loss"], results[size]["trained_loss"]
    assert not torch.allclose(one["state"]["weight"], torch.randn(3, 16, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(several["state"], one["state"], rtol=0, atol=1e-5)
    assert several["val_loss"] == pytest.approx(one["val_loss"], abs=1e-5)


@pytest.mark.parametrize("size", [2, 3])
def test_batch_norm_of_each_worker_alone_is_asked_for_by_name(results: Results, size: int) -> None:
    one, several = results[1]["batch_norm"]["unsynced"], results[size]["batch_norm"]["unsynced"]
    assert several["history"][-1]["val_loss"] != pytest.approx(one["history"][-1]["val_loss"], abs=1e-4)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_batch_norm_trains_whatever_is_left_over_in_as_many_steps_by_any_number_of_workers(
    results: Results, size: int
) -> None:
    found = results[size]["left_over"]
    assert {name: told["steps"] for name, told in found.items()} == {"33 in 1": 2, "11 in 1": 4, "8 in 8": 2}
    assert "Expected more than 1 value per channel" in found["33 in 1"]["note"]
    assert bool(found["11 in 1"]["note"]) == (size > 1)


@pytest.mark.parametrize("size", [2, 3])
def test_all_workers_stop_when_one_is_asked_to(results: Results, size: int) -> None:
    assert results[size]["one_worker_stops"] == 2


@pytest.mark.parametrize("size", [1, 2, 3])
def test_workers_go_on_from_the_first_workers_checkpoint(results: Results, size: int) -> None:
    states = results[size]["resumed"]
    assert all(torch.equal(states["resumed"][name], tensor) for name, tensor in states["uninterrupted"].items())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_users_loop_shares_each_global_batch_among_the_workers(results: Results, size: int) -> None:
    """Eleven samples in batches of four: the last has three."""
    outcome = results[size]["users_loop"]
    steps = [sorted(number for part in parts for number in part) for parts in zip(*outcome["batches"])]
    assert [len(step) for step in steps] == [4, 4, 3]
    assert sorted(number for step in steps for number in step) == list(range(11))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_users_loop_reports_the_first_workers_row_and_plain_names(results: Results, size: int) -> None:
    outcome = results[size]["users_loop"]
    assert outcome["val_loss"] == 0.0
    assert outcome["names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_all_workers_fail_together_where_the_loss_of_one_is_not_finite(results: Results, size: int) -> None:
    assert "the training loss became nan in epoch 2, step 3" in results[size]["loss_of_one_worker_is_nan"]


def test_a_parameter_without_gradient_is_named_where_ddp_would_hang(results: Results) -> None:
    assert results[1]["unused_parameter"] == "trained"
    assert "the loss does not depend on spare" in results[2]["unused_parameter"]
