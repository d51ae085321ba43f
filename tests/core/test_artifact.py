"""A record present means done, a record absent means not done, whatever else is in the folder."""

import json
import os
from dataclasses import asdict

import pytest

from heliostat.core.artifact import (
    RECORD,
    Record,
    digest_files,
    find_artifact,
    keep_only,
    read_record,
    records,
    write_record,
)
from heliostat.errors import ArtifactError

RECORDED = Record(
    kind="model",
    pipeline="toy",
    node="train",
    stage="train",
    uses="train",
    fingerprint="0123456789abcdef",
    identity={"config": {"epochs": 3}},
    metrics={"val_accuracy": 0.5, "val_loss": float("inf")},
    params={"train": {"model_args": {"name": "größe"}}},
    started_at="2024-01-01T00:00:00+00:00",
)


def test_a_record_reads_back_as_it_was_written(tmp_path):
    write_record(tmp_path, RECORDED)
    assert read_record(tmp_path) == RECORDED
    assert os.listdir(tmp_path) == [RECORD]


def test_a_folder_without_a_record_is_not_done_whatever_else_is_in_it(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"x")
    (tmp_path / f".{RECORD}.1.tmp").write_text(json.dumps(asdict(RECORDED)))
    assert read_record(tmp_path) is None
    assert find_artifact(tmp_path) is None
    assert find_artifact(tmp_path / "nowhere") is None


def test_a_write_that_dies_half_way_leaves_the_record_before_it(tmp_path, monkeypatch):
    write_record(tmp_path, RECORDED)
    before = (tmp_path / RECORD).read_bytes()

    def power_cut(descriptor):
        raise OSError("no power")

    monkeypatch.setattr(os, "fsync", power_cut)
    with pytest.raises(OSError, match="no power"):
        write_record(tmp_path, Record(**{**asdict(RECORDED), "node": "other"}))
    assert (tmp_path / RECORD).read_bytes() == before


@pytest.mark.parametrize("damage", [lambda text: text[: len(text) // 2], lambda text: "", lambda text: "[1]"])
def test_a_damaged_record_is_an_error_that_says_what_to_do(tmp_path, damage):
    write_record(tmp_path, RECORDED)
    path = tmp_path / RECORD
    path.write_text(damage(path.read_text()))
    with pytest.raises(ArtifactError, match=r"record\.json is damaged .*; delete that folder and run again"):
        find_artifact(tmp_path)


def test_a_record_of_another_release_with_unknown_fields_is_an_error(tmp_path):
    (tmp_path / RECORD).write_text(json.dumps({**asdict(RECORDED), "colour": "red"}))
    with pytest.raises(ArtifactError, match="colour"):
        read_record(tmp_path)


def test_an_artifact_whose_files_are_gone_or_cut_short_is_not_done(tmp_path):
    (tmp_path / "code").mkdir()
    for name in ("weights.pt", "code/toy.py"):
        (tmp_path / name).write_bytes(b"12345")
    files = digest_files(tmp_path, ["weights.pt", "code/toy.py"])
    assert files["weights.pt"]["bytes"] == 5
    write_record(tmp_path, Record(**{**asdict(RECORDED), "files": files}))
    found = find_artifact(tmp_path)
    assert found is not None
    assert (found.node, found.metrics["val_accuracy"]) == ("train", 0.5)

    (tmp_path / "weights.pt").write_bytes(b"123")
    assert find_artifact(tmp_path) is None
    (tmp_path / "weights.pt").write_bytes(b"12345")
    assert find_artifact(tmp_path) is not None
    (tmp_path / "code/toy.py").unlink()
    assert find_artifact(tmp_path) is None


def test_a_file_that_was_announced_but_not_written_is_an_error(tmp_path):
    with pytest.raises(ArtifactError, match=r"weights\.pt was announced"):
        digest_files(tmp_path, ["weights.pt"])


def test_only_what_is_named_is_kept(tmp_path):
    for name in ("model.json", "code/toy.py", "code/old.py", "checkpoints/1/state.pt", "code/deep/er.py", "x.tmp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    (tmp_path / "link").symlink_to(outside)
    keep_only(tmp_path, ["model.json", "code/toy.py"])
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["code", "code/toy.py", "model.json"]
    assert (outside / "precious").exists()


def test_the_records_of_a_store_come_oldest_first_and_without_damaged_ones(tmp_path):
    def put(pipeline: str, stage: str, day: int) -> None:
        folder = tmp_path / pipeline / stage / f"f{day}"
        folder.mkdir(parents=True)
        fields = {"pipeline": pipeline, "stage": stage, "started_at": f"2024-01-0{day}"}
        write_record(folder, Record(**{**asdict(RECORDED), **fields}))

    for pipeline, stage, day in [("toy", "train", 3), ("toy", "prune", 1), ("other", "train", 2)]:
        put(pipeline, stage, day)
    damaged = tmp_path / "toy/train/f9"
    damaged.mkdir()
    (damaged / RECORD).write_text("{")

    def days(**which: str) -> list[str]:
        return [record.started_at[-1] for _, record in records(tmp_path, **which)]

    assert days() == ["1", "2", "3"]
    assert days(pipeline="toy") == ["1", "3"]
    assert days(pipeline="toy", stage="train") == ["3"]
    assert days(pipeline="nothing") == []
