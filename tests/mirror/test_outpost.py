"""A machine of a cluster that does not see the driver's folder: what it leaves, the driver has, and others."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from heliostat.core.artifact import digest_files
from heliostat.core.carrier import HERE, followed
from heliostat.errors import ArtifactError
from heliostat.mirror import bucket
from heliostat.mirror.outpost import Outpost

NODE = "toy/train/0123456789abcdef"


@pytest.fixture
def driver(machine):
    """The driver's folder of a node, and its mirror while a cluster runs."""
    store, mirror = machine("driver")
    with mirror.on_cluster():
        yield store / NODE, mirror


@pytest.fixture
def other(driver, tmp_path):
    """Makes what a process on another machine works through, as it gets it there."""
    folder, mirror = driver

    def make(name: str) -> Outpost:
        store = tmp_path / name / ".heliostat"
        return replace(mirror.carrier(folder), store=store, folder=store / NODE, mark=store / "not seen" / "mark")

    return make


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def sent(s3) -> set[str]:
    return {key.rpartition("/")[2] for key in s3.objects() if not key.endswith("/")}


def test_what_a_task_made_on_another_machine_is_at_the_driver_when_it_looks(driver, other):
    folder, mirror = driver
    write(folder, model="an earlier one", log="mine")
    outpost = other("b")
    with mirror.following(folder, anew=False) as exchange:
        assert followed(outpost, {}, (outpost.folder / "log").read_text) == "mine"
        with outpost.following():
            write(outpost.folder, model="the later one.")
        exchange(["model", "log"])
        assert (folder / "model").read_text() == "the later one."


def test_what_was_made_at_the_driver_meanwhile_is_what_counts(driver, other, s3):
    folder, mirror = driver
    with mirror.following(folder, anew=False) as exchange:
        with other("b").following():
            write(other("b").folder, journal="half")
        write(folder, journal="whole")
        exchange(["journal"])
        assert (folder / "journal").read_text() == "whole"
    with other("c").following():
        assert (other("c").folder / "journal").read_text() == "whole"


def test_a_file_is_taken_once_and_only_as_its_record_tells(driver, other, s3):
    folder, mirror = driver
    write(folder, model="weights")
    files = digest_files(folder, ["model"])
    mirror.send(folder)
    outpost = other("b")
    outpost.take(outpost.folder, files)
    assert (outpost.folder / "model").read_text() == "weights"

    s3.client.put_object(Bucket="models", Key=f"team/{NODE}/model", Body=b"WEIGHTS")
    outpost.take(outpost.folder, files)
    assert (outpost.folder / "model").read_text() == "weights"
    with pytest.raises(ArtifactError, match=r"is not the file that its record tells of; .*--force train"):
        other("c").take(other("c").folder, files)
    assert not (other("c").folder / "model").exists()


def test_what_a_process_leaves_is_sent_while_it_runs_and_what_it_deletes_is_deleted(other, s3, monkeypatch, eventually):
    monkeypatch.setattr(bucket, "SEND_EVERY_S", 0.05)
    outpost = other("b")
    with outpost.following():
        write(outpost.folder, first="1")
        eventually(lambda: sent(s3) == {"first"}, "it is sent", timeout_s=20)
        write(outpost.folder, second="2")
        (outpost.folder / "first").unlink()
        eventually(lambda: sent(s3) == {"second"}, "the other is deleted", timeout_s=20)


def test_processes_of_one_machine_know_what_the_others_have_sent(other, s3):
    with other("b").following():
        write(other("b").folder, first="1")
    (other("b").folder / "first").unlink()
    other("b").send(other("b").folder)
    assert sent(s3) == set()


def test_what_a_process_that_failed_left_is_there_for_the_next_one(other):
    with suppress(KeyboardInterrupt), other("b").following():
        write(other("b").folder, checkpoint="1")
        raise KeyboardInterrupt
    with other("c").following():
        assert (other("c").folder / "checkpoint").read_text() == "1"


def test_what_an_earlier_run_left_on_the_machine_and_not_in_the_bucket_is_cleared_away(other, s3):
    with other("b").following():
        write(other("b").folder, kept="1", lost="2")
    s3.client.delete_object(Bucket="models", Key=f"team/{NODE}/lost")
    later = replace(other("b"), mark=other("b").mark.with_name("of a later run"))
    with later.following():
        assert {path.name for path in later.folder.glob("[!.]*")} == {"kept"}


def test_a_process_that_sees_the_drivers_folder_fetches_and_leaves_sending_to_the_driver(driver, other, s3):
    folder, mirror = driver
    with other("b").following():
        write(other("b").folder, checkpoint="1")
    with mirror.carrier(folder).following():
        assert (folder / "checkpoint").read_text() == "1"
        write(folder, second="2")
    assert sent(s3) == {"checkpoint"}


def test_what_a_process_cannot_send_in_the_end_is_its_failure(other, s3):
    def lose() -> None:
        write(other("b").folder, model="weights")
        s3.stop()

    with pytest.raises(ArtifactError, match="NETWORK_CONNECTION"):
        followed(other("b"), {}, lose)
    s3.start()


def test_without_a_cluster_there_is_nothing_to_carry(machine):
    store, mirror = machine("driver")
    assert mirror.carrier(store / NODE) is HERE
