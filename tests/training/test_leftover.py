"""Single samples, of which batch norm has no statistics, join the batch beside them; other models train as before."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, TensorDataset

from heliostat.errors import SpecError
from heliostat.training.batches import epoch_batches, num_steps, training_shares
from heliostat.training.config import TrainConfig
from heliostat.training.loop import fit
from heliostat.training.progress import Fit
from heliostat.training.task import Objective
from heliostat.training.world import World


def rows(num_samples: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(num_samples) % 3
    return TensorDataset(torch.randn(num_samples, 8, generator=generator) + targets[:, None], targets)


class Stream(IterableDataset[Any]):
    def __init__(self, num_samples: int) -> None:
        self._rows = rows(num_samples)

    def __iter__(self) -> Iterator[Any]:
        return iter([self._rows[index] for index in range(len(self._rows))])


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


class Seen:
    """The sizes of the batches that a loss was given, those of the trials before training left out."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, outputs: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
        self.sizes.append(len(outputs))
        return nn.functional.cross_entropy(outputs, batch[1])


def train(model: nn.Module, train: Any, seen: Seen | None = None, **options: Any) -> Fit:
    config = TrainConfig(**{"epochs": 1, "batch_size": 32, **options})
    objective = Objective(nn.functional.cross_entropy)
    return fit(model, {"train": train, "val": rows(9)}, config, objective=objective, seed=1, batch_loss=seen)


@pytest.mark.parametrize("kind", [rows, Stream])
def test_a_last_batch_of_one_sample_joins_the_one_before_and_the_record_says_so(kind: Any) -> None:
    seen = Seen()
    fitted = train(normed(), kind(65), seen)
    assert seen.sizes[-2:] == [32, 33]
    assert fitted.notes["batches"].startswith("single samples join the batch beside them")
    assert "Expected more than 1 value per channel" in fitted.notes["batches"]


def test_parts_of_one_sample_join_each_other() -> None:
    seen = Seen()
    train(normed(), rows(8), seen, batch_size=8, accumulate_steps=8)
    assert seen.sizes[-4:] == [2, 2, 2, 2]


def test_models_that_train_on_one_sample_keep_their_batches() -> None:
    plain = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    maps = nn.Sequential(nn.Unflatten(1, (2, 2, 2)), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    for model in (plain, maps):
        seen = Seen()
        assert train(model, rows(65), seen).notes == {}
        assert seen.sizes[-3:] == [32, 32, 1]


def test_a_loss_that_fails_on_one_sample_gets_more() -> None:
    def squeezed(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs.squeeze(), targets)

    config = TrainConfig(epochs=1, batch_size=32)
    data = {"train": rows(65), "val": rows(9)}
    fitted = fit(nn.Linear(8, 3), data, config, objective=Objective(squeezed), seed=1)
    assert "batches" in fitted.notes


def test_a_batch_size_of_one_with_batch_norm_is_refused_before_training() -> None:
    with pytest.raises(SpecError, match=r"batch_size: .*cannot train on one sample .*; take 2 or more"):
        train(normed(), rows(8), batch_size=1)


def test_a_batch_size_of_one_trains_where_the_maps_are_larger_than_one_value() -> None:
    maps = nn.Sequential(nn.Unflatten(1, (2, 2, 2)), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    assert train(maps, rows(8), batch_size=1).epochs == 1


@pytest.mark.parametrize("num_samples", [2, 3, 4, 5, 9, 31, 32, 33, 34, 35, 63, 64, 65, 66])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("parts", [1, 3, 32])
def test_no_share_is_a_single_sample_and_all_workers_have_as_many(num_samples: int, size: int, parts: int) -> None:
    everyone = [
        training_shares(
            num_samples,
            batch_size=32,
            seed=5,
            epoch=1,
            world=World(rank, size),
            accumulate_steps=parts,
            min_rows=2,
        )
        for rank in range(size)
    ]
    assert all(len(share.indices) >= 2 for mine in everyone for share in mine)
    assert len({len(mine) for mine in everyone}) == 1
    counted = [index for mine in everyone for s in mine for index in s.indices[: s.num_samples].tolist()]
    assert sorted(counted) == list(range(num_samples))
    steps = sum(share.ends_step for share in everyone[0])
    assert steps == num_steps(rows(num_samples), 32, min_rows=2)
    weights = sum(share.weight for mine in everyone for share in mine) / size
    assert weights == pytest.approx(steps)


@pytest.mark.parametrize("num_samples", [2, 31, 32, 33, 34, 64, 65])
def test_a_stream_is_cut_as_other_data_is(num_samples: int) -> None:
    batches = epoch_batches(
        Stream(num_samples), batch_size=32, seed=0, epoch=1, world=World(), device=torch.device("cpu"), min_rows=2
    )
    shares = training_shares(num_samples, batch_size=32, seed=0, epoch=1, world=World(), min_rows=2)
    assert [share.num_samples for share, _ in batches] == [share.num_samples for share in shares]
