"""Storage in a bucket: the machine is lost, or the bucket does not answer, and the same command goes on."""

import io
import json
from pathlib import Path

import pytest
import torch

STORAGE = ("--set", "storage=s3://models/team")
SLOW = """

import time

quick_accuracy = accuracy


def accuracy(outputs, targets):
    time.sleep(0.6)
    return quick_accuracy(outputs, targets)
"""


@pytest.fixture
def machine(tmp_path, toy_in, s3):
    """A folder with the toy's code and nothing else: what a new machine has of it."""

    def make(name, stages, *, slow=False):
        toy = toy_in(tmp_path / name)
        toy.module.write_text(toy.module.read_text() + (SLOW if slow else ""))
        toy.write({**toy.document, "stages": stages})
        return toy

    return make


def answer(process):
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def statuses(document):
    return {node["name"]: node["status"] for node in document["nodes"]}


@pytest.mark.slow
def test_another_machine_reuses_what_is_in_the_bucket(machine, heliostat):
    train = {"name": "train", "uses": "train", "config": {"epochs": 2}}
    made = answer(heliostat("run", machine("a", [train]).file, *STORAGE, "--json"))
    other = machine("b", [train])
    again = answer(heliostat("run", other.file, *STORAGE, "--json"))
    assert statuses(again) == {"train": "reused"}
    assert again["nodes"][0]["metrics"] == made["nodes"][0]["metrics"]


@pytest.mark.slow
def test_another_machine_fetches_the_files_that_it_needs_and_no_others(machine, heliostat):
    train = {"name": "train", "uses": "train", "config": {"epochs": 2}}
    best = {"name": "best", "uses": "select", "inputs": {"baseline": "train", "candidates": ["train"]}}
    answer(heliostat("run", machine("a", [train]).file, *STORAGE, "--json"))

    other = machine("b", [train, best])
    planned = answer(heliostat("plan", other.file, *STORAGE, "--json"))
    assert statuses(planned) == {"train": "reuse", "best": "run"}
    (folder,) = other.folder.glob(".heliostat/toy/train/*")
    assert [path.name for path in folder.iterdir()] == ["record.json"]
    ran = answer(heliostat("run", other.file, *STORAGE, "--json"))
    assert statuses(ran) == {"train": "reused", "best": "ran"}

    third = machine("c", [train, best])
    reused = answer(heliostat("run", third.file, *STORAGE, "--json"))
    assert statuses(reused) == {"train": "reused", "best": "reused"}
    assert (Path(reused["selected"]["path"]) / "model.json").is_file()
    assert not list(third.folder.glob(".heliostat/toy/train/*/model.json"))


@pytest.mark.slow
def test_a_lost_machine_is_replaced_and_search_and_training_go_on(machine, heliostat, s3, kill_when):
    space = {"optimizer.lr": {"loguniform": [0.001, 0.1]}}
    stages = [
        {"name": "search", "uses": "tune", "config": {"trials": 4, "space": space, "train": {"epochs": 1}}},
        {"name": "train", "uses": "train", "inputs": {"params": "search"}, "config": {"epochs": 20}},
    ]

    def killed_when(toy, moment, what):
        options = {"cwd": toy.folder, "moment": moment, "what": what, "TOY_FOLDER": str(toy.folder)}
        kill_when(heliostat, "run", toy.file, *STORAGE, **options)

    def journal():
        keys = [key for key in s3.objects() if key.endswith("journal.jsonl")]
        bodies = [s3.client.get_object(Bucket="models", Key=key)["Body"].read().decode() for key in keys]
        return [json.loads(line) for body in bodies for line in body.splitlines(keepends=True) if line.endswith("\n")]

    def ended():
        return {event["id"]: event for event in journal() if event["event"] == "ended"}

    def newest_epoch():
        keys = [key for key in s3.objects() if "/epoch-" in key]
        return max((int(key.partition("/epoch-")[2][:5]) for key in keys), default=0)

    killed_when(machine("a", stages, slow=True), lambda: len(ended()) >= 2, "two trials are in the bucket")
    ended_at_kill = ended()
    killed_when(machine("b", stages, slow=True), lambda: newest_epoch() >= 3, "three epochs are in the bucket")
    assert ended_at_kill.items() <= ended().items()
    newest = max(key for key in s3.objects() if "/epoch-" in key)
    content = s3.client.get_object(Bucket="models", Key=newest)["Body"].read()
    trained_at_kill = torch.load(io.BytesIO(content), weights_only=True)["progress"]["history"]

    document = answer(heliostat("run", machine("c", stages, slow=True).file, *STORAGE, "--json"))
    assert statuses(document) == {"search": "reused", "train": "ran"}
    record = json.loads((Path(document["nodes"][1]["path"]) / "record.json").read_text())
    history = record["details"]["history"]
    assert len(history) == 20
    assert history[: len(trained_at_kill)] == trained_at_kill  # the very durations that the lost machine measured
    assert not [key for key in s3.objects() if "/checkpoints/epoch" in key]


@pytest.mark.slow
def test_a_bucket_that_goes_away_loses_nothing(machine, heliostat, s3, eventually):
    toy = machine("a", [{"name": "train", "uses": "train", "config": {"epochs": 4}}], slow=True)
    process = heliostat.start("run", toy.file, *STORAGE)
    eventually(lambda: any("/epoch-" in key for key in s3.objects()), "an epoch is in the bucket")
    s3.stop()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "storage: s3://models/team" in errors
    assert f"what was made is in {toy.folder / '.heliostat'}, and this sends it: heliostat run" in errors

    again = heliostat("run", toy.file, *STORAGE)
    assert again.returncode == 2
    assert "storage: s3://models/team" in again.stderr

    s3.start()
    assert statuses(answer(heliostat("run", toy.file, *STORAGE, "--json"))) == {"train": "reused"}
    other = machine("b", [{"name": "train", "uses": "train", "config": {"epochs": 4}}], slow=True)
    assert statuses(answer(heliostat("plan", other.file, *STORAGE, "--json"))) == {"train": "reuse"}
