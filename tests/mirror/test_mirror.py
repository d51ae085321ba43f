"""A store with a bucket behind it: what one machine made, another has; what arrives in part does not count."""

import logging
import os
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from heliostat import mirror as mirrors
from heliostat.core.artifact import RECORD, Record, digest_files, find_artifact, write_record
from heliostat.errors import ArtifactError, SpecError
from heliostat.mirror import bucket
from heliostat.training.checkpoints import Checkpoints

NODE = "toy/train/0123456789abcdef"


def make_node(store: Path, **files: str) -> Path:
    """A finished node whose artifact is these files."""
    folder = store / NODE
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    record = Record(
        kind="model",
        pipeline="toy",
        node="train",
        stage="train",
        uses="train",
        fingerprint="0123456789abcdef",
        identity={},
        files=digest_files(folder, files),
    )
    write_record(folder, record)
    return folder


def save(folder: Path, epoch: int, *, is_best: bool = False) -> None:
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save({"epoch": epoch, "weight": torch.full((50,), float(epoch))}, epoch=epoch, is_best=is_best)
    checkpoints.flush()


@pytest.fixture
def stopped_at(s3, monkeypatch):
    """In its block the bucket goes away when the file of a name is to be sent; afterwards it is there again."""

    @contextmanager
    def stopped_at(name):
        opened = Path.open

        def open_unless_named(path, *arguments, **options):
            if path.name == name:
                s3.stop()
            return opened(path, *arguments, **options)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "open", open_unless_named)
            yield
        s3.start()

    return stopped_at


def epochs(names) -> list[int]:
    return sorted(int(Path(name).name.split("-")[1].split(".")[0]) for name in names if "/epoch-" in str(name))


def test_a_finished_node_is_found_and_fetched_by_another_machine(machine, s3):
    store, mirror = machine("a")
    mirror.send(make_node(store, **{"model": "weights", "code/toy.py": "code"}))
    assert set(s3.objects()) == {f"team/{NODE}/{name}" for name in ("model", "code/toy.py", RECORD)}

    other, mirror = machine("b")
    there = mirror.look("toy")
    assert find_artifact(other / NODE) is None
    assert find_artifact(other / NODE, elsewhere=there) is not None
    mirror.fetch(other / NODE)
    assert find_artifact(other / NODE) is not None
    assert (other / NODE / "code/toy.py").read_text() == "code"


def test_a_node_whose_files_did_not_all_arrive_has_no_record_there(machine, s3, stopped_at):
    store, mirror = machine("a")
    folder = make_node(store, a_first="1", z_last="2")
    with stopped_at("z_last"), pytest.raises(ArtifactError, match=r"storage: s3://models/team: .*NETWORK_CONNECTION"):
        mirror.send(folder)
    assert f"team/{NODE}/{RECORD}" not in s3.objects()

    mirror.send(folder)
    assert f"team/{NODE}/{RECORD}" in s3.objects()


def test_what_is_older_arrives_first(machine, s3, stopped_at):
    store, mirror = machine("a")
    folder = make_node(store, a="newest", b="newer", c="oldest")
    for age, name in enumerate("abc"):
        os.utime(folder / name, (1000 - age, 1000 - age))
    with stopped_at("a"), pytest.raises(ArtifactError):
        mirror.send(folder)
    assert set(s3.objects()) == {f"team/{NODE}/{name}" for name in "bc"}


def test_a_file_that_was_cut_short_there_makes_its_node_one_that_is_not_done(machine, s3):
    store, mirror = machine("a")
    mirror.send(make_node(store, model="weights"))
    s3.client.put_object(Bucket="models", Key=f"team/{NODE}/model", Body=b"wei")
    other, mirror = machine("b")
    assert find_artifact(other / NODE, elsewhere=mirror.look("toy")) is None


def test_a_file_that_was_altered_there_is_refused_when_it_is_fetched(machine, s3):
    store, mirror = machine("a")
    mirror.send(make_node(store, model="weights"))
    s3.client.put_object(Bucket="models", Key=f"team/{NODE}/model", Body=b"weighty")
    other, mirror = machine("b")
    mirror.look("toy")
    with pytest.raises(ArtifactError, match=f"{NODE}/model is not the file that its record tells of; .*--force train"):
        mirror.fetch(other / NODE)


def test_a_node_that_was_made_again_elsewhere_is_the_one_that_counts(machine):
    store, mirror = machine("a")
    mirror.send(make_node(store, model="weights", card="text"))
    other, mirror_of_other = machine("b")
    with mirror_of_other.following(other / NODE, anew=True):
        make_node(other, model="WEIGHTS", card="text")

    mirror.look("toy")
    assert not (store / NODE / "model").exists()
    mirror.fetch(store / NODE)
    assert (store / NODE / "model").read_text() == "WEIGHTS"


def test_a_node_with_a_file_that_was_cut_short_there_is_made_again(machine, s3):
    store, mirror = machine("a")
    mirror.send(make_node(store, model="weights"))
    s3.client.put_object(Bucket="models", Key=f"team/{NODE}/model", Body=b"wei")
    other, mirror = machine("b")
    mirror.look("toy")
    with mirror.following(other / NODE, anew=False):
        make_node(other, model="weights")
    assert s3.objects()[f"team/{NODE}/model"] == len("weights")


def test_checkpoints_are_sent_while_the_stage_runs_and_old_ones_deleted(machine, s3, monkeypatch, eventually):
    monkeypatch.setattr(bucket, "SEND_EVERY_S", 0.05)
    store, mirror = machine("a")
    with mirror.following(store / NODE, anew=False):
        for epoch in (1, 2, 3, 4):
            save(store / NODE, epoch, is_best=epoch == 1)
            eventually(lambda newest=epoch: newest in epochs(s3.objects()), "the newest is there", timeout_s=20)
        eventually(lambda: epochs(s3.objects()) == [1, 3, 4], "the second is deleted", timeout_s=20)


def test_another_machine_goes_on_with_what_an_interrupted_stage_had_sent(machine):
    store, mirror = machine("a")
    with suppress(KeyboardInterrupt), mirror.following(store / NODE, anew=False):
        save(store / NODE, 1, is_best=True)
        save(store / NODE, 2)
        raise KeyboardInterrupt
    other, mirror = machine("b")
    with mirror.following(other / NODE, anew=False):
        found = Checkpoints(other / NODE / "checkpoints").latest()
        assert found is not None
        assert found["epoch"] == 2


def test_a_machine_that_comes_back_takes_up_what_another_did_meanwhile(machine, s3):
    (store, mirror), (other, mirror_of_other) = machine("a"), machine("b")
    with mirror.following(store / NODE, anew=False):
        save(store / NODE, 1, is_best=True)
        (store / NODE / "journal.jsonl").write_text("1\n")
    with mirror_of_other.following(other / NODE, anew=False):
        save(other / NODE, 2)
        save(other / NODE, 3)
        (other / NODE / "journal.jsonl").write_text("1\n2\n")
    with mirror.following(store / NODE, anew=False):
        assert epochs((store / NODE / "checkpoints").iterdir()) == [1, 2, 3]
        assert (store / NODE / "journal.jsonl").read_text() == "1\n2\n"
    assert epochs(s3.objects()) == [1, 2, 3]


def test_a_checkpoint_that_was_cut_short_there_is_passed_over_for_the_one_before(machine, s3, caplog):
    store, mirror = machine("a")
    with mirror.following(store / NODE, anew=False):
        save(store / NODE, 1, is_best=True)
        save(store / NODE, 2)
    newest = next(key for key in s3.objects() if "epoch-00002" in key)
    s3.client.put_object(Bucket="models", Key=newest, Body=b"half")
    other, mirror = machine("b")
    with mirror.following(other / NODE, anew=False):
        found = Checkpoints(other / NODE / "checkpoints").latest()
    assert found is not None
    assert found["epoch"] == 1
    assert "is damaged" in caplog.text


def test_what_is_hidden_or_half_written_stays_here(machine, s3):
    store, mirror = machine("a")
    with mirror.following(store / NODE, anew=False):
        for name in (".record.json.7.tmp", "epoch-00001.tmp/part", ".ray/state", "checkpoints/a.pt.tmp", "kept"):
            (store / NODE / name).parent.mkdir(parents=True, exist_ok=True)
            (store / NODE / name).write_text("x")
    assert list(s3.objects()) == [f"team/{NODE}/kept"]


def test_a_stage_that_is_forced_starts_from_nothing_there_too(machine, s3):
    store, mirror = machine("a")
    mirror.send(make_node(store, model="weights"))
    other, mirror = machine("b")
    with mirror.following(other / NODE, anew=True):
        pass
    assert not [key for key in s3.objects() if not key.endswith("/")]


def test_a_record_that_changes_leaves_files_alone_that_were_never_fetched(machine, s3):
    store, mirror = machine("a")
    mirror.send(make_node(store, model="weights"))
    other, mirror = machine("b")
    mirror.look("toy")
    (other / NODE / RECORD).write_text((other / NODE / RECORD).read_text() + "\n")
    mirror.send(other / NODE)
    assert f"team/{NODE}/model" in s3.objects()


def test_a_server_that_is_away_for_a_while_gets_everything_later(machine, s3, caplog):
    store, mirror = machine("a")
    with caplog.at_level(logging.WARNING), mirror.following(store / NODE, anew=False):
        save(store / NODE, 1, is_best=True)
        s3.stop()
    assert "is sent later" in caplog.text
    s3.start()
    assert epochs(s3.objects()) == []
    mirror.send(store / NODE)
    assert epochs(s3.objects()) == [1]


def test_a_bucket_that_nobody_answers_for_is_told_before_anything_starts(machine, s3):
    _, mirror = machine("a")
    s3.stop()
    with pytest.raises(SpecError, match=r"storage: s3://models/team: .*NETWORK_CONNECTION"):
        mirror.look("toy")
    s3.start()


def test_a_store_in_a_folder_has_no_mirror(machine, tmp_path):
    store, mirror = machine("a", storage=str(tmp_path / "store"))
    assert store == tmp_path / "store"
    assert isinstance(mirror, mirrors.NoMirror)


def test_a_file_that_was_damaged_here_is_fetched_again(machine, s3):
    store, mirror = machine("a")
    folder = make_node(store, model="weights")
    mirror.send(folder)
    (folder / "model").write_text("weighst")
    there = mirror.look("toy")
    assert find_artifact(folder) is None
    assert find_artifact(folder, elsewhere=there) is not None
    mirror.fetch(folder)
    assert (folder / "model").read_text() == "weights"


@pytest.mark.parametrize("key", ["toy/../../outside", "toy//tmp/outside"])
def test_an_object_whose_key_leads_out_of_the_store_is_refused(machine, s3, key):
    _, mirror = machine("a")
    s3.client.put_object(Bucket="models", Key=f"team/{key}", Body=b"x")
    with pytest.raises(ArtifactError, match="is not the name of a file below that folder"):
        mirror.look("toy")


def test_a_record_in_the_bucket_whose_names_lead_out_of_its_folder_is_refused(machine, s3, tmp_path):
    store, mirror = machine("a")
    folder = make_node(store, model="weights")
    mirror.send(folder)
    text = (folder / RECORD).read_text().replace('"model": {', '"../../../../precious": {')
    s3.client.put_object(Bucket="models", Key=f"team/{NODE}/{RECORD}", Body=text.encode())
    (store.parent / "precious").write_text("x")
    _, mirror = machine("b")
    with pytest.raises(ArtifactError, match="precious' is not the name of a file"):
        mirror.look("toy")
