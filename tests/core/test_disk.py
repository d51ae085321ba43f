"""A full disk reads as one, whatever library met it."""

import errno
import os
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from heliostat.core.disk import disk_error, why_failed, why_not_written, writing_to
from heliostat.errors import DiskError, StageError

FULL = r"the disk of {} is full \(\d+\.\d MB free\); free some"


def test_a_full_disk_is_named_by_the_file_and_with_the_room_that_is_left(tmp_path):
    with pytest.raises(DiskError, match=FULL.format("/dev")), writing_to(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "x"), None, "/dev/full")


def test_without_the_name_of_a_file_the_fuller_disk_of_the_folder_and_the_scratch_is_meant(tmp_path):
    with pytest.raises(DiskError, match=FULL.format(f"({tmp_path}|{tempfile.gettempdir()})")), writing_to(tmp_path):
        Path("/dev/full").write_text("x")


def test_a_full_sqlite_database_is_a_full_disk(tmp_path):
    with sqlite3.connect(tmp_path / "x.db") as database:
        database.execute("PRAGMA max_page_count = 2")
        with pytest.raises(DiskError, match="is full"), writing_to(tmp_path):
            database.executescript("CREATE TABLE a (b); CREATE TABLE c (d); CREATE TABLE e (f)")


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EDQUOT, "the quota of the disk of {} is used up; free some"),
        (errno.EROFS, "the disk of {} is read-only; make it writable"),
    ],
)
def test_a_quota_and_a_read_only_disk_are_told_apart(tmp_path, number, said):
    file = tmp_path / "x"
    assert why_not_written(OSError(number, "...", str(file)), Path("/")) == said.format(tmp_path)
    told_by_others = StageError(f"RuntimeError: [Errno {number}] ...\n  File ...")
    assert isinstance(disk_error(told_by_others, tmp_path), DiskError)


@pytest.mark.parametrize("error", [ValueError("File too large"), FileNotFoundError(2, "no"), StageError("all failed")])
def test_other_errors_stay_what_they_are(tmp_path, error):
    assert disk_error(error, tmp_path) is None
    with pytest.raises(type(error)), writing_to(tmp_path):
        raise error


def test_an_error_that_a_full_disk_caused_is_found_behind_what_was_raised_for_it(tmp_path):
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "x"))
        except OSError as error:
            raise ValueError("cannot save") from error
    except ValueError as error:
        told = why_failed(error, tmp_path)
    assert told.startswith(f"the disk of {tmp_path} is full (")
    assert told.endswith("; free some and run again: the same call of heliostat.run")


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from heliostat.core.disk import disk_error
from heliostat.training.checkpoints import Checkpoints

resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
folder = Path(sys.argv[1])
checkpoints = Checkpoints(folder)
try:
    checkpoints.save({"weights": torch.zeros(100_000)}, epoch=1, is_best=True)
    checkpoints.flush()
except Exception as error:
    print(disk_error(error, folder))
"""


def test_a_checkpoint_that_torch_cannot_write_says_why(tmp_path):
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"a file in {tmp_path} is larger than ulimit -f allows (0.1 MB); raise that limit"


def test_an_error_of_torch_that_has_another_cause_is_no_full_disk(tmp_path):
    with pytest.raises(RuntimeError) as raised:
        torch.save({}, tmp_path / "no such folder" / "x.pt")
    assert disk_error(raised.value, tmp_path) is None
