from itertools import chain
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from heliostat.training.batches import evaluation_shares, load_batches, split_evenly, training_shares
from heliostat.training.world import World

CPU = torch.device("cpu")


def epoch_of(
    world_size: int, *, num_samples: int = 21, accumulate_steps: int = 1, epoch: int = 1
) -> list[list[list[int]]]:
    """The counted samples of every worker by step."""
    workers = []
    for rank in range(world_size):
        shares = training_shares(
            num_samples,
            batch_size=4,
            seed=5,
            epoch=epoch,
            world=World(rank=rank, size=world_size),
            accumulate_steps=accumulate_steps,
        )
        steps: list[list[int]] = [[]]
        for share in shares:
            steps[-1] += share.indices[: share.num_samples].tolist()
            if share.ends_step:
                steps.append([])
        workers.append(steps[:-1])
    return workers


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
@pytest.mark.parametrize("accumulate_steps", [1, 2, 9])
def test_every_world_size_sees_the_same_global_batches(world_size: int, accumulate_steps: int) -> None:
    (expected,) = epoch_of(1)
    workers = epoch_of(world_size, accumulate_steps=accumulate_steps)
    assert [sorted(chain(*parts)) for parts in zip(*workers)] == [sorted(step) for step in expected]
    assert [len(step) for step in expected] == [4, 4, 4, 4, 4, 1]
    assert sorted(chain(*expected)) == list(range(21))


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_the_parts_of_an_accumulated_batch_are_the_same_for_any_number_of_workers(world_size: int) -> None:
    """What is computed together has its statistics together, such as those of batch norm."""

    def parts(size: int) -> list[list[int]]:
        worlds = (World(rank, size) for rank in range(size))
        shares = [
            training_shares(21, batch_size=8, seed=5, epoch=1, world=world, accumulate_steps=3) for world in worlds
        ]
        counted = [[share.indices[: share.num_samples].tolist() for share in mine] for mine in shares]
        return [list(chain(*together)) for together in zip(*counted)]

    assert parts(world_size) == parts(1)


def test_every_epoch_has_an_order_of_its_own() -> None:
    assert epoch_of(1, epoch=1) != epoch_of(1, epoch=2)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_weights_make_the_workers_average_the_mean_over_the_global_batch(world_size: int) -> None:
    worlds = [World(rank=rank, size=world_size) for rank in range(world_size)]
    shares = [training_shares(21, batch_size=4, seed=5, epoch=1, world=world, accumulate_steps=2) for world in worlds]
    values = torch.randn(21, dtype=torch.float64)
    total = sum(share.weight * values[share.indices].mean() for worker in shares for share in worker) / world_size
    (batches,) = epoch_of(1)
    assert float(total) == pytest.approx(float(sum(values[batch].mean() for batch in batches)))


def test_a_worker_without_a_sample_borrows_one_at_no_weight() -> None:
    share = training_shares(1, batch_size=4, seed=5, epoch=1, world=World(rank=1, size=2))[0]
    assert (share.indices.tolist(), share.num_samples, share.weight) == ([0], 0, 0.0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 30])
def test_evaluation_covers_the_split_once_and_in_order(world_size: int) -> None:
    seen = [
        index
        for rank in range(world_size)
        for share in evaluation_shares(21, batch_size=4, world=World(rank=rank, size=world_size))
        for index in share.indices[: share.num_samples].tolist()
    ]
    assert seen == list(range(21))


def test_parts_differ_by_one_at_most() -> None:
    assert split_evenly(11, 3) == [4, 4, 3]


class Computed(TensorDataset):
    def __getitem__(self, index: int) -> Any:
        inputs, targets = super().__getitem__(index)
        return inputs * 10, targets


def batches_of(dataset: Dataset[Any], num_samples: int) -> list[list[float]]:
    shares = training_shares(num_samples, batch_size=4, seed=5, epoch=1, world=World())
    return [batch[0].tolist() for _, batch in load_batches(dataset, shares, device=CPU)]


def test_a_subset_of_a_subset_of_tensors_gives_its_own_samples() -> None:
    whole = TensorDataset(torch.arange(20.0), torch.arange(20))
    subset = Subset(Subset(whole, range(0, 20, 2)), [9, 0, 4])
    assert sorted(batches_of(subset, 3)[0]) == [0.0, 8.0, 18.0]
    assert batches_of(subset, 3) == batches_of([subset[i] for i in range(3)], 3)  # type: ignore[arg-type]


def test_a_subclass_that_computes_its_samples_is_asked_for_each() -> None:
    dataset = Computed(torch.ones(4), torch.zeros(4))
    assert batches_of(dataset, 4) == [[10.0] * 4]


def test_tensors_are_never_asked_for_single_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorDataset, "__getitem__", lambda self, index: pytest.fail("one sample at a time"))
    assert len(batches_of(TensorDataset(torch.ones(8), torch.ones(8)), 8)) == 2
