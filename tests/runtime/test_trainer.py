import os
import threading

import pytest

from heliostat.core.spec import Resources
from heliostat.errors import StageError
from heliostat.runtime.trainer import train_workers
from heliostat.training.checkpoints import Checkpoints
from heliostat.training.config import TrainConfig

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture
def train(task, root, tmp_path, reporter):
    def train(workers=1, retries=0, cancel=None, hang_timeout_s=1800, **config):
        return train_workers(
            task,
            TrainConfig(**{"epochs": 2, "batch_size": 16} | config),
            resources=Resources(workers=workers, hang_timeout_s=hang_timeout_s),
            seed=0,
            root=root,
            folder=tmp_path,
            reporter=reporter,
            cancel=cancel or threading.Event(),
            retries=retries,
        )

    return train


def losses(reporter):
    return [row["val_loss"] for _, row in reporter.rows[None]]


def test_one_worker_trains_in_place_and_leaves_checkpoints(train, reporter, tmp_path):
    fit = train()
    assert [epoch for epoch, _ in reporter.rows[None]] == [1, 2]
    assert [row["val_loss"] for row in fit.history] == losses(reporter)
    assert Checkpoints(tmp_path / "checkpoints").latest() is not None


def test_training_goes_on_from_the_last_checkpoint(train, reporter):
    train(epochs=2)
    assert train(epochs=4).epochs == 4
    assert [epoch for epoch, _ in reporter.rows[None]] == [1, 2, 3, 4]


def test_the_users_error_comes_back_as_its_own_text(train):
    with pytest.raises(StageError, match=r"^ValueError: no net is 4 wide"):
        train(model_args={"fail": "raise"})


def test_two_workers_follow_the_curve_of_one(train, reporter, tmp_path):
    together = train(workers=2, optimizer={"name": "sgd", "lr": 0.1})
    assert [epoch for epoch, _ in reporter.rows[None]] == [1, 2]
    assert losses(reporter) == pytest.approx([row["val_loss"] for row in together.history])
    for file in (tmp_path / "checkpoints").iterdir():
        file.unlink()
    alone = train(optimizer={"name": "sgd", "lr": 0.1})
    assert [row["val_loss"] for row in together.history] == pytest.approx(
        [row["val_loss"] for row in alone.history], abs=1e-4
    )
    assert together.state.keys() == alone.state.keys()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "tp", "pp"])
def test_workers_that_share_one_model_go_on_from_the_newest_parts_that_are_whole(train, reporter, strategy, tmp_path):
    before = train(workers=2, strategy=strategy, epochs=3)
    (newest,) = (tmp_path / "checkpoints").glob("epoch-00003.*")
    shard = newest / "__1_0.distcp"
    os.truncate(shard, shard.stat().st_size // 2)
    fit = train(workers=2, strategy=strategy, epochs=4)
    assert [epoch for epoch, _ in reporter.rows[None]] == [1, 2, 3, 3, 4]
    assert fit.history[:2] == before.history[:2]
    assert list(fit.state) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    (warning,) = reporter.warnings
    assert warning.startswith(f"checkpoint {newest} is damaged")


@pytest.mark.slow
def test_the_users_error_in_one_of_several_workers_comes_back_as_its_own_text(train):
    with pytest.raises(StageError, match=r"^ValueError: no net is 4 wide"):
        train(workers=2, model_args={"fail": "raise"})


@pytest.mark.slow
def test_workers_that_are_killed_are_told_as_such(train):
    with pytest.raises(StageError, match=r"worker \d: its process was killed or crashed"):
        train(workers=2, model_args={"fail": "kill"})


@pytest.mark.slow
def test_several_workers_stop_when_told_to(train, reporter):
    cancel = threading.Event()
    threading.Thread(target=lambda: (reporter.on_row.wait(120), cancel.set())).start()
    with pytest.raises(KeyboardInterrupt):
        train(workers=2, cancel=cancel, epochs=10_000)


def test_a_worker_that_died_is_started_again_loudly(train, tmp_path, reporter):
    assert train(retries=1, model_args={"once": str(tmp_path / "once")}).epochs == 2
    assert reporter.warnings == ["its process was killed or crashed; it is started again"]


@pytest.mark.slow
def test_several_workers_are_started_again_after_one_of_them_died(train, tmp_path):
    assert train(workers=2, retries=1, model_args={"once": str(tmp_path / "once")}).epochs == 2
    assert (tmp_path / "once").exists()


@pytest.mark.slow
def test_a_worker_that_hangs_counts_as_dead(train, tmp_path):
    hanging = {"hang": str(tmp_path / "hang")}
    with pytest.raises(StageError, match=r"worker 0 lost a peer: .*Timed out waiting 3000ms"):
        train(workers=2, hang_timeout_s=3, model_args=hanging)
    (tmp_path / "hang").unlink()
    assert train(workers=2, retries=1, hang_timeout_s=3, model_args=hanging).epochs == 2


@pytest.mark.slow
def test_one_worker_that_hangs_counts_as_dead_and_is_told_where_it_was(train, tmp_path):
    hanging = {"hang": str(tmp_path / "hang")}
    expected = r"no sign of life for 1 s \(resources.hang_timeout_s\); .*:\n.*toy\.py\", line \d+ in build_model"
    with pytest.raises(StageError, match=expected):
        train(hang_timeout_s=1, model_args=hanging)
    (tmp_path / "hang").unlink()
    assert train(retries=1, hang_timeout_s=1, model_args=hanging).epochs == 2


def test_one_worker_that_makes_steps_does_not_hang(train, reporter):
    fit = train(hang_timeout_s=1, epochs=1, batch_size=1, model_args={"step_s": 0.1})
    assert fit.history[0]["seconds"] > 3


def test_one_worker_that_computes_before_it_makes_a_step_does_not_hang(train):
    assert train(hang_timeout_s=1, epochs=1, model_args={"busy_s": 3.5}).epochs == 1


@pytest.mark.slow
def test_one_worker_that_computes_a_step_without_end_hangs(train):
    with pytest.raises(StageError, match=r"no sign of life for 1 s .*:\n(.*\n)*.*toy\.py"):
        train(hang_timeout_s=1, model_args={"endless": True})


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_the_users_error_is_not_tried_again(train, tmp_path, workers):
    builds = tmp_path / "builds"
    with pytest.raises(StageError, match=r"^ValueError: no net is 4 wide"):
        train(workers=workers, retries=2, model_args={"fail": "raise", "builds": str(builds)})
    assert 1 <= len(builds.read_text().split()) <= workers
