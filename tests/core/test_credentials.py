"""Passwords leave a pipeline where it is read, and come back only for who needs them."""

import json
import subprocess
import sys

import pytest

from heliostat import Pipeline, Stage, Task, Tracking, plan
from heliostat.core import credentials
from heliostat.core.credentials import hide, hide_in_argument, is_credential, redacted, revealed, with_user
from heliostat.errors import SpecError

SECRET = "hunter2-f7a1"


@pytest.fixture(autouse=True)
def _empty_vault(monkeypatch):
    for name in (credentials.VAULT, credentials.USER, credentials.PASSWORD):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    "text",
    [
        f"http://user:{SECRET}@host:5000/path",
        f"postgresql+psycopg2://user:{SECRET}@db/mlflow",
        f"s3://key:{SECRET}@bucket/prefix is away",
        f"--extra-index-url https://{SECRET}@index.example.org/simple",
        f"http://host/api?token={SECRET}&page=2",
        f"s3://bucket/prefix?access_key=id&secret_key={SECRET}",
        f"connect(host='db', password={SECRET})",
        f"http://user:p@ss{SECRET}@host/",
    ],
)
def test_a_text_is_shown_without_the_passwords_of_uris(text):
    assert SECRET not in redacted(text)
    assert redacted(redacted(text)) == redacted(text)


@pytest.mark.parametrize("text", ["http://host:5000/a@b", "user@example.org", "sqlite:////tmp/a.db", "lr=0.1", "3@4"])
def test_a_text_without_passwords_is_shown_as_it_is(text):
    assert redacted(text) == text


@pytest.mark.parametrize(
    "key",
    ["password", "db_password", "api_key", "apiKey", "API-KEY", "secret", "aws_secret_access_key", "token", "hf_token"],
)
def test_values_of_keys_that_say_so_are_passwords(key):
    assert is_credential(key, SECRET)
    assert redacted({"args": [{key: SECRET, "width": 8}]}) == {"args": [{key: "***", "width": 8}]}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pad_token", "<pad>"),
        ("num_tokens", 5),
        ("tokenizer", "bert"),
        ("max_tokens", "5"),
        ("key", "a"),
        ("secret", True),
    ],
)
def test_other_values_are_none(key, value):
    assert not is_credential(key, value)


def test_a_tracking_address_is_held_without_its_user_who_is_there_for_mlflow(monkeypatch):
    tracking = Tracking(uri=f"http://user:{SECRET}%21@host:5000/base")
    assert tracking.uri == "http://host:5000/base"
    assert credentials.use_for_mlflow(tracking.uri) == "http://host:5000/base"
    assert credentials.os.environ[credentials.USER] == "user"
    assert credentials.os.environ[credentials.PASSWORD] == f"{SECRET}!"


def test_a_database_is_opened_with_the_user_that_was_taken_out_or_the_one_of_the_environment(monkeypatch):
    uri = Tracking(uri=f"postgresql://user:{SECRET}@db/mlflow").uri
    assert uri == "postgresql://db/mlflow"
    assert credentials.use_for_mlflow(uri) == f"postgresql://user:{SECRET}@db/mlflow"
    monkeypatch.setenv(credentials.USER, "other")
    monkeypatch.setenv(credentials.PASSWORD, "word")
    assert credentials.use_for_mlflow("postgresql://db2/mlflow") == "postgresql://other:word@db2/mlflow"


def test_the_config_of_a_stage_holds_what_stands_for_a_password_and_the_users_function_gets_the_real_one():
    stage = Stage(
        "train", {"data_args": {"db_password": SECRET, "url": f"mysql://u:{SECRET}@db/x", "rows": 5}}, uses="train"
    )
    assert SECRET not in repr(stage)
    assert revealed(stage.config["data_args"]) == {"db_password": SECRET, "url": f"mysql://u:{SECRET}@db/x", "rows": 5}


def test_a_variable_can_be_named_in_place_of_a_password(monkeypatch):
    config = hide({"password": "env:DB_PASSWORD"}, place="train")
    assert config == {"password": "env:DB_PASSWORD"}
    with pytest.raises(SpecError, match=r"data_args\.password: the variable DB_PASSWORD is not set"):
        revealed(config, place="data_args")
    monkeypatch.setenv("DB_PASSWORD", SECRET)
    assert revealed(config) == {"password": SECRET}


def test_a_process_that_does_not_know_a_password_says_what_to_write():
    with pytest.raises(SpecError, match="password: it is not known to this process; write `password: env:NAME`"):
        revealed({"password": "hidden:train.data_args.password"})


def test_a_changed_password_changes_no_fingerprint_and_none_is_in_it(toy):
    def planned(password):
        document = toy.document
        stage = {"name": "train", "uses": "train", "config": {"epochs": 1, "model_args": {"token": password}}}
        task = Task(**document["task"])
        return plan(Pipeline(name="toy", task=task, stages=(Stage(**stage),), root=toy.folder)).nodes[0]

    toy.module.write_text(toy.module.read_text().replace("bias=True", "bias=True, token=''"))
    one, other = planned(SECRET), planned("another")
    assert one.fingerprint == other.fingerprint
    assert SECRET not in json.dumps(one.identity)


def test_a_storage_with_credentials_is_refused_without_showing_them(toy):
    with pytest.raises(ValueError, match="leave out the credentials") as refused:
        Pipeline(
            name="toy",
            task=Task(**toy.document["task"]),
            stages=(Stage("train", {}, uses="train"),),
            storage=f"s3://key:{SECRET}@bucket/prefix",
        )
    assert "s3://***@bucket/prefix" in str(refused.value)
    assert SECRET not in str(refused.value)


def test_words_of_a_command_line_hide_passwords_too():
    words = [
        f"tracking.uri=http://user:{SECRET}@host",
        f"--set=stages.train.config.data_args.password={SECRET}",
        "epochs=3",
    ]
    hidden = [hide_in_argument(word) for word in words]
    assert hidden[0] == "tracking.uri=http://host"
    assert hidden[2] == "epochs=3"
    assert SECRET not in repr(hidden)
    assert with_user("http://host") == f"http://user:{SECRET}@host"


def test_an_error_of_the_command_line_shows_no_password(toy):
    toy.write({**toy.document, "tracking": {"uri": f"htp://user:{SECRET}@host"}, "storage": f"s3://k:{SECRET}@b?x=1"})
    command = [sys.executable, "-m", "heliostat.cli", "plan", str(toy.file), "--set", f"seed=http://u:{SECRET}@host"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert SECRET not in done.stdout + done.stderr
