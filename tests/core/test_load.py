"""From text to a pipeline: what this YAML reads as, `--set`, and `defaults`."""

import math

import pytest

from heliostat.core.load import load_pipeline, parse_yaml
from heliostat.runner import plan


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.0e-4", 1e-4),
        ("-2E+3", -2000.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("+.5e1", 5.0),
        (".inf", math.inf),
        ("12", 12),
        ("0x10", 16),
        ("1e", "1e"),
        ("e4", "e4"),
        ("1.2.3", "1.2.3"),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("Off", "Off"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("'1e-4'", "1e-4"),
    ],
)
def test_a_scalar_reads_as_what_it_looks_like(text, value):
    read = parse_yaml(f"x: {text}", name="file")["x"]
    assert read == value
    assert type(read) is type(value)


def test_anchors_and_merge_keys_work_as_in_yaml():
    text = "a: &a {epochs: 3, batch_size: 8}\nb: &b {<<: *a, epochs: 5}\nc: {<<: *b, seed: 1}"
    read = parse_yaml(text, name="file")
    assert read["b"] == {"epochs": 5, "batch_size": 8}
    assert read["c"] == {"epochs": 5, "batch_size": 8, "seed": 1}


def test_a_setting_is_yaml_at_a_path_with_stages_by_name(toy):
    pipeline = load_pipeline(
        toy.file,
        settings=[
            "seed=7",
            "tracking.experiment=other",
            "storage=elsewhere",
            "stages.train.config.optimizer.lr=1e-2",
            "stages.train.resources.workers=2",
            "stages.0.config.trials=9",
            "stages.search.config.space.optimizer.lr={uniform: [0.1, 0.2]}",
            "stages.prune.matrix.sparsity=[0.1, 0.2, 0.3]",
            "stages.int8.inputs.model=train",
        ],
    )
    search, train, prune, _, int8, _ = pipeline.stages
    assert (pipeline.seed, pipeline.experiment, pipeline.storage) == (7, "other", "elsewhere")
    assert train.config == {"epochs": 3, "optimizer": {"lr": 0.01}}
    assert train.resources.workers == 2
    assert search.config["trials"] == 9
    assert search.config["space"] == {
        "optimizer.lr": {"uniform": [0.1, 0.2]},
        "model_args.width": {"choice": [8, 16]},
    }
    assert prune.matrix == {"sparsity": (0.1, 0.2, 0.3)}
    assert int8.inputs == {"model": ("train",)}


def test_a_setting_gives_what_the_file_would_have_given(toy):
    set_on_the_line = load_pipeline(toy.file, settings=["stages.train.config.epochs=5"])
    document = toy.document
    document["stages"][1]["config"]["epochs"] = 5
    assert set_on_the_line == load_pipeline(toy.write(document))


def test_the_last_of_two_settings_holds(toy):
    assert load_pipeline(toy.file, settings=["seed=1", "seed=2"]).seed == 2


def test_defaults_reach_every_stage_of_their_kind_and_give_way_to_what_it_says(toy):
    document = toy.document
    document["defaults"] = {
        "train": {"config": {"epochs": 9, "optimizer": {"name": "sgd", "lr": 0.5}}, "resources": {"workers": 2}},
        "quantize": {"config": {"method": "dynamic"}, "retries": 2},
    }
    document["stages"][1]["config"] = {"epochs": 3, "optimizer": {"lr": 0.1}}
    _, train, prune, _, int8, _ = load_pipeline(toy.write(document)).stages
    assert train.config == {"epochs": 3, "optimizer": {"name": "sgd", "lr": 0.1}}
    assert train.resources.workers == 2
    assert (int8.config, int8.retries) == ({"method": "dynamic"}, 2)
    assert (prune.config, prune.retries) == ({"finetune_epochs": 1}, 0)


def test_defaults_are_gone_once_they_are_merged(toy):
    written_out, with_defaults = toy.document, toy.document
    written_out["stages"][1]["config"] = {"batch_size": 32, "epochs": 3}
    with_defaults["defaults"] = {"train": {"config": {"batch_size": 32}}}
    one, other = load_pipeline(toy.write(written_out, "a.yaml")), load_pipeline(toy.write(with_defaults, "b.yaml"))
    assert one == other
    assert plan(one).fingerprint == plan(other).fingerprint


def test_the_folder_of_the_file_is_where_modules_and_the_store_are(toy, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    pipeline = load_pipeline("toy/toy.yaml")
    assert pipeline.root == toy.folder.resolve()
    assert pipeline.storage_folder == toy.folder.resolve() / ".heliostat"
    assert pipeline.tracking_uri == f"sqlite:///{toy.folder.resolve()}/.heliostat/mlflow.db"
