"""Commands that messages suggest: they carry the flags that were given."""

import shlex
import sys
from pathlib import Path

import pytest

from heliostat.core import commands
from heliostat.core.commands import Given, command, note_given, run_again, submit_again, with_store

SETTINGS = ["stages.search.config.trials=4", "stages.search.config.space.lr={uniform: [0, 1]}"]


@pytest.fixture(autouse=True)
def _as_installed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["heliostat"])
    monkeypatch.setattr(commands, "_given", Given())


def test_a_run_is_suggested_with_the_flags_that_were_given_and_quoted_for_a_shell():
    note_given(Path("my pipelines/toy.yaml"), SETTINGS, address="auto", force=["train"])
    words = ["heliostat", "run", "my pipelines/toy.yaml", "--set", SETTINGS[0], "--set", SETTINGS[1]]
    assert shlex.split(run_again()) == [*words, "--address", "auto"]


def test_force_is_repeated_only_where_the_run_has_to_begin_anew():
    note_given(Path("toy.yaml"), None, force=["train", "prune"])
    assert run_again() == "heliostat run toy.yaml"
    assert run_again(force=True) == "heliostat run toy.yaml --force train --force prune"
    assert run_again("--force", "best") == "heliostat run toy.yaml --force best"


def test_a_suggested_command_shows_no_password():
    note_given(Path("toy.yaml"), ["tracking.uri=http://me:secret@host:5000"])
    assert run_again() == "heliostat run toy.yaml --set 'tracking.uri=http://***@host:5000'"


def test_a_job_is_suggested_as_it_was_submitted(monkeypatch):
    note_given(Path("toy.yaml"), ["storage=/srv"], address="auto")
    submitted = submit_again(Given(Path("a/toy.yaml"), SETTINGS[:1], "http://head:8265"))
    assert submitted == f"heliostat submit a/toy.yaml --set {SETTINGS[0]} --address http://head:8265"
    monkeypatch.setenv(commands.SUBMITTED_AS, submitted)
    assert run_again() == submitted


def test_a_store_is_named_from_the_working_directory_where_it_lies_below_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert with_store("ui", tmp_path / "my store") == "heliostat ui --storage 'my store'"
    assert with_store("sync", Path("/srv/store")) == "heliostat sync --storage /srv/store"


def test_the_command_is_named_by_its_path_where_its_environment_is_not_active(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "venv" / "bin" / "heliostat")])
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    monkeypatch.chdir(tmp_path)
    assert command("run", "x.yaml") == "venv/bin/heliostat run x.yaml"


def test_in_python_where_nothing_was_typed_the_call_is_named():
    assert run_again() == "the same call of heliostat.run"
    assert run_again("--force", "train") == "heliostat run FILE --force train"
