"""Journals: what is written is read again, by one process at a time, and only what was written whole."""

import pytest

from heliostat.tracking.events import Event, cleaned, from_json, to_json
from heliostat.tracking.spool import Journal, left_behind, mark_delivered
from heliostat.tracking.writer import Target, absolute_uri

TARGET = Target("sqlite:////store/mlflow.db", "digits")


def loss(step):
    return Event("metrics", "p", 1_700_000_000_000, {"values": {"loss": 1.0}, "step": step})


def test_a_journal_gives_back_what_was_not_delivered(tmp_path):
    journal = Journal.create(tmp_path, TARGET)
    mark_delivered([journal.append(loss(step)) for step in (1, 2)])
    journal.append(loss(3))
    journal.append(loss(4))
    journal.release()

    (again,) = left_behind(tmp_path)
    assert again.target == TARGET
    assert [one.event for one in again.undelivered()] == [loss(3), loss(4)]
    again.release()


def test_a_journal_that_is_delivered_leaves_nothing(tmp_path):
    journal = Journal.create(tmp_path, TARGET)
    mark_delivered([journal.append(loss(1))])
    assert len(list(tmp_path.iterdir())) == 2
    journal.release()
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    journal = Journal.create(tmp_path, TARGET)
    journal.append(loss(1))
    journal.append(loss(2))
    journal.release()
    (path,) = tmp_path.glob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-5])

    (again,) = left_behind(tmp_path)
    spooled = again.undelivered()
    assert [one.event for one in spooled] == [loss(1)]
    mark_delivered(spooled)
    again.release()
    assert list(tmp_path.iterdir()) == []


def test_a_journal_in_use_is_not_left_behind(tmp_path):
    journal = Journal.create(tmp_path, TARGET)
    journal.append(loss(1))
    assert list(left_behind(tmp_path)) == []
    journal.release()
    assert len(list(left_behind(tmp_path))) == 1


def test_an_event_survives_its_line():
    event = cleaned(Event("start", "p", 1, {"name": "é\n", "parent": None, "tags": {}, "params": {"a": {"b": None}}}))
    line = to_json(event)
    assert "\n" not in line
    assert from_json(line) == event
    assert event.data["params"] == {"a.b": "None"}


def test_a_metric_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="could not convert"):
        cleaned(Event("metrics", "p", 1, {"values": {"loss": "high"}, "step": 1}))


def test_a_relative_store_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("sqlite:///runs/mlflow.db") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert absolute_uri("https://tracking.example/") == "https://tracking.example"
