import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from heliostat.training.checkpoints import Checkpoints, digest_parts, folder_name


def save(folder: Path, *best_flags: bool) -> Checkpoints:
    """Epochs 1, 2, ... with the given flags."""
    checkpoints = Checkpoints(folder)
    for epoch, is_best in enumerate(best_flags, start=1):
        checkpoints.save({"epoch": epoch, "weight": torch.full((50,), float(epoch))}, epoch=epoch, is_best=is_best)
    checkpoints.flush()
    return checkpoints


def kept_epochs(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1].split(".")[0]) for path in folder.iterdir())


def epoch_of(state: dict[str, Any] | None) -> int:
    assert state is not None
    return int(state["epoch"])


def test_a_folder_without_checkpoints_has_none(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "none")
    assert checkpoints.latest() is checkpoints.best() is None


def test_the_last_two_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = save(tmp_path, True, True, False, False, False)
    assert kept_epochs(tmp_path) == [2, 4, 5]
    assert epoch_of(checkpoints.latest()) == 5
    assert epoch_of(checkpoints.best()) == 2


@pytest.mark.parametrize("damage", ["truncated", "empty", "altered"])
def test_a_damaged_newest_checkpoint_is_passed_over_loudly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    checkpoints = save(tmp_path, True, False, False, True)
    assert kept_epochs(tmp_path) == [1, 3, 4]
    (newest,) = tmp_path.glob("epoch-00004*")
    content = newest.read_bytes()
    middle = len(content) // 2
    altered = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    newest.write_bytes({"truncated": content[:middle], "empty": b"", "altered": altered}[damage])
    assert epoch_of(checkpoints.latest()) == 3
    assert epoch_of(checkpoints.best()) == 1
    assert f"{newest} is damaged" in caplog.text


def test_a_half_written_file_is_ignored_and_cleared_away(tmp_path: Path) -> None:
    checkpoints = save(tmp_path, True)
    half = tmp_path / f"epoch-00002.{'0' * 32}.pt.tmp"
    half.write_bytes(b"half")
    assert epoch_of(checkpoints.latest()) == 1
    save(tmp_path, True, False)
    assert not half.exists()


def test_an_epoch_saved_again_replaces_what_came_after_the_one_gone_back_to(tmp_path: Path) -> None:
    checkpoints = save(tmp_path, True, False, True, True)
    checkpoints.save({"epoch": 3, "again": True}, epoch=3, is_best=False)
    assert epoch_of(checkpoints.latest()) == 3
    assert kept_epochs(tmp_path) == [3]


def test_loading_never_runs_code(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({"payload": Path("/")}, epoch=1, is_best=False)
    with pytest.raises(Exception, match="Weights only load failed"):
        checkpoints.latest()


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on = threading.Event()
    wait_and_write = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (goes_on.wait(30), wait_and_write(descriptor)))
    weight, checkpoints = torch.zeros(3), Checkpoints(tmp_path)
    checkpoints.save({"epoch": 1, "weight": weight}, epoch=1, is_best=True)
    weight += 1  # the next step changes the weights in place
    assert not list(tmp_path.glob("epoch-*.pt"))
    goes_on.set()
    saved = checkpoints.latest()
    assert saved is not None
    assert torch.equal(saved["weight"], torch.zeros(3))


def test_what_went_wrong_with_a_checkpoint_is_raised_when_it_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    checkpoints = Checkpoints(tmp_path / "file")
    checkpoints.save({"epoch": 1}, epoch=1, is_best=True)
    with pytest.raises(FileExistsError):
        checkpoints.save({"epoch": 2}, epoch=2, is_best=True)
    checkpoints.flush()


def test_as_many_are_kept_as_asked_for(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    for epoch in range(1, 7):
        checkpoints.save({"epoch": epoch}, epoch=epoch, is_best=epoch == 2)
    checkpoints.flush()
    assert kept_epochs(tmp_path) == [2, 4, 5, 6]


def keep_folder(checkpoints: Checkpoints, epoch: int, *, is_best: bool) -> None:
    aside = checkpoints.folder / f"epoch-{epoch:05d}.tmp"
    aside.mkdir()
    for part in range(2):
        (aside / f"__{part}_0.distcp").write_text(f"{epoch} {part}")
    (aside / ".metadata").write_text("which parts there are")
    name = folder_name(digest_parts(aside.iterdir()), epoch=epoch, is_best=is_best)
    checkpoints.keep_folder(aside, name)
    checkpoints.prune(newest=name)


def test_a_damaged_part_of_the_newest_folder_is_noticed_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path)
    for epoch, is_best in enumerate((True, False, False, True), start=1):
        keep_folder(checkpoints, epoch, is_best=is_best)
    assert kept_epochs(tmp_path) == [1, 3, 4]
    newest = next(tmp_path.glob("epoch-00004*"))
    assert checkpoints.newest_folders() == (newest, newest)
    (newest / "__1_0.distcp").unlink()
    third, first = next(tmp_path.glob("epoch-00003*")), next(tmp_path.glob("epoch-00001*"))
    assert checkpoints.newest_folders() == (third, first)
    assert f"{newest} is damaged" in caplog.text


def test_a_folder_that_a_crash_left_half_written_is_cleared_away(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    (tmp_path / "epoch-00001.tmp").mkdir()
    keep_folder(checkpoints, 2, is_best=True)
    assert kept_epochs(tmp_path) == [2]


def test_a_folder_with_the_parts_of_one_machine_alone_is_no_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path)
    for epoch in (1, 2):
        keep_folder(checkpoints, epoch, is_best=True)
    first, second = (next(tmp_path.glob(f"epoch-0000{epoch}*")) for epoch in (1, 2))
    (second / ".metadata").unlink()
    assert checkpoints.newest_folders() == (first, first)
    assert caplog.text == ""
