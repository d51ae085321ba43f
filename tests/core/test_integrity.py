"""Files are what their record says, or are named; names that lead elsewhere are refused before they are used."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from heliostat.core import integrity
from heliostat.core.artifact import RECORD, Record, digest_files, find_artifact, parse_record, read_record, write_record
from heliostat.errors import ArtifactError

RECORDED = Record("model", "toy", "train", "train", "train", "0123456789abcdef", {})


@pytest.fixture
def folder(tmp_path) -> Path:
    """A finished node of two files."""
    folder = tmp_path / "toy/train/0123456789abcdef"
    (folder / "code").mkdir(parents=True)
    for name in ("weights.pt", "code/toy.py"):
        (folder / name).write_bytes(b"12345")
    write_record(folder, Record(**{**asdict(RECORDED), "files": digest_files(folder, ["weights.pt", "code/toy.py"])}))
    return folder


def test_a_file_of_the_same_size_and_another_content_is_damaged(folder):
    assert find_artifact(folder) is not None
    (folder / "weights.pt").write_bytes(b"12344")
    assert find_artifact(folder) is None
    assert integrity.damaged(folder, read_record(folder).files) == ["weights.pt"]
    (folder / "weights.pt").write_bytes(b"12345")
    assert find_artifact(folder) is not None


def test_a_changed_file_with_the_old_times_is_still_found_out(folder):
    assert find_artifact(folder) is not None
    before = (folder / "weights.pt").stat()
    (folder / "weights.pt").write_bytes(b"12344")
    os.utime(folder / "weights.pt", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert find_artifact(folder) is None


def test_a_file_that_was_found_to_match_is_not_read_again(folder, monkeypatch):
    assert find_artifact(folder) is not None
    monkeypatch.setattr(integrity, "digest_of", lambda path: pytest.fail(f"{path} is read again"))
    assert find_artifact(folder) is not None
    assert sorted(os.listdir(folder)) == ["code", RECORD, "weights.pt"]
    assert os.listdir(folder.parent) == [folder.name]


def test_a_note_that_was_cut_short_only_costs_the_reading(folder):
    assert find_artifact(folder) is not None
    (note,) = folder.parents[2].glob(".verified/*")
    note.write_text('{"weights.pt": [')
    assert find_artifact(folder) is not None


def test_a_damaged_file_that_can_be_fetched_is_none_to_make_again(folder):
    (folder / "weights.pt").write_bytes(b"12344")
    assert find_artifact(folder, elsewhere={folder / "weights.pt": 5}) is not None


@pytest.mark.parametrize(
    "name",
    ["../weights.pt", "/etc/passwd", "code/../../x", "", ".", "code//toy.py", "a\nb", "a\\b", "a\0b", "a\x1b[2Jb"],
)
def test_a_record_with_a_name_that_leads_out_of_its_folder_is_refused(folder, name):
    document = json.loads((folder / RECORD).read_text())
    document["files"][name] = document["files"]["weights.pt"]
    (folder / RECORD).write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match="is not the name of a file below that folder"):
        find_artifact(folder)


@pytest.mark.parametrize("entry", [None, {}, {"sha256": "x", "bytes": 5}, {"sha256": "0" * 64, "bytes": "5"}])
def test_a_record_without_digests_of_its_files_is_refused(folder, entry):
    document = json.loads((folder / RECORD).read_text())
    document["files"]["weights.pt"] = entry
    with pytest.raises(ArtifactError, match=r"weights\.pt has no sha256 and size"):
        parse_record(json.dumps(document), place="here")


@pytest.mark.parametrize("link", ["weights.pt", "code"])
def test_a_link_that_leads_out_of_the_folder_is_refused(folder, tmp_path, link):
    outside = tmp_path / "outside"
    (folder / link).rename(outside)
    (folder / link).symlink_to(outside)
    with pytest.raises(ArtifactError, match=r"is a link that leads to .*outside"):
        find_artifact(folder)


def test_a_link_within_the_folder_and_one_to_the_whole_store_are_followed(folder, tmp_path):
    (folder / "weights.pt").rename(folder / "kept.pt")
    (folder / "weights.pt").symlink_to("kept.pt")
    (tmp_path / "link").symlink_to(tmp_path / "toy")
    assert find_artifact(tmp_path / "link/train/0123456789abcdef") is not None


@pytest.mark.parametrize("fields", [{"format": 2}, {"format": 9, "colour": "red"}, {"colour": "red"}])
def test_a_record_of_a_newer_version_says_so_and_advises_to_update(folder, fields):
    document = {**json.loads((folder / RECORD).read_text()), **fields}
    with pytest.raises(ArtifactError, match=r"was written by a newer Heliostat .*; update this one") as refused:
        parse_record(json.dumps(document), place="here")
    assert "delete" not in str(refused.value)


def test_a_record_of_an_older_version_has_no_format_and_is_read(folder):
    document = json.loads((folder / RECORD).read_text())
    del document["format"]
    assert parse_record(json.dumps(document), place="here") == read_record(folder)
