"""Identity is what a node is, never where or how it runs; both halves are pinned here."""

import importlib
import shutil
from pathlib import Path

import pytest

from heliostat import (
    DistillConfig,
    MetricRef,
    Pipeline,
    PruneConfig,
    Resources,
    SelectConfig,
    Stage,
    Task,
    Tracking,
    TrainConfig,
    TuneConfig,
)
from heliostat.core.identity import canonical_json, explain_change, fingerprint
from heliostat.core.load import load_pipeline
from heliostat.runner import plan


def fingerprints(pipeline) -> dict[str, str]:
    return {node.name: node.fingerprint for node in plan(pipeline).nodes}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    """The stages that have a node which is new or another."""
    return {name.partition("[")[0] for name in after if before.get(name) != after[name]}


EVERYTHING = {"search", "train", "prune", "student", "int8", "best"}


# --- what is no part of it -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting",
    [
        "storage=elsewhere",
        "tracking={uri: 'http://localhost:1', experiment: other}",
        "stages.search.resources={workers_per_trial: 2, cpus_per_worker: 3, max_concurrent_trials: 1}",
        "stages.train.resources={workers: 4, gpus_per_worker: 1}",
        "stages.train.retries=3",
        "stages.train.config.batch_size=64",
        "stages.prune.config.method=structured",
    ],
)
def test_where_and_how_and_defaults_spelled_out_change_nothing(toy, setting):
    before = fingerprints(load_pipeline(toy.file))
    assert fingerprints(load_pipeline(toy.file, settings=[setting])) == before


def test_the_folder_of_the_project_is_no_part_of_identity(toy, tmp_path):
    before = fingerprints(load_pipeline(toy.file))
    moved = tmp_path / "elsewhere"
    shutil.move(toy.folder, moved)
    importlib.invalidate_caches()
    assert fingerprints(load_pipeline(moved / "toy.yaml")) == before


def test_the_way_a_number_or_a_mapping_is_written_is_no_part_of_identity():
    assert canonical_json({"b": 1.0, "a": (1, 2)}) == canonical_json({"a": [1, 2], "b": 1}) == '{"a":[1,2],"b":1}'
    assert fingerprint({"a": 1e-4}) == fingerprint({"a": 0.0001})
    assert fingerprint({"a": True}) != fingerprint({"a": 1})
    assert fingerprint({"a": "1"}) != fingerprint({"a": 1})


def test_a_fingerprint_is_the_same_in_every_process_and_release():
    assert fingerprint({"kind": "prune", "config": {"sparsity": 0.5}, "inputs": {}}) == "564d52d26cba8e80"


# --- what is ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "reruns"),
    [
        ("seed=1", EVERYTHING),
        ("task.loss=torch.nn:CrossEntropyLoss", EVERYTHING),
        ("task.data_version=2024-06", EVERYTHING),
        ("task.metrics=[{reference: 'toy:accuracy', mode: min}]", EVERYTHING),
        ("stages.search.config.trials=5", EVERYTHING),
        ("stages.train.config.epochs=4", EVERYTHING - {"search"}),
        ("stages.prune.config.finetune_epochs=2", {"prune", "int8", "best"}),
        ("stages.prune.matrix.sparsity=[0.25, 0.6]", {"prune", "int8", "best"}),
        ("stages.student.config.alpha=0.5", {"student", "int8", "best"}),
        ("stages.int8.config.method=dynamic", {"int8", "best"}),
        ("stages.best.config.minimize=[size_mb]", {"best"}),
        ("stages.best.inputs.candidates=[train, prune]", {"best"}),
    ],
)
def test_a_changed_value_changes_that_stage_and_those_after_it(toy, setting, reruns):
    before = fingerprints(load_pipeline(toy.file))
    assert changed(before, fingerprints(load_pipeline(toy.file, settings=[setting]))) == reruns


def test_a_matrix_value_that_stays_keeps_its_node(toy):
    before = fingerprints(load_pipeline(toy.file))
    after = fingerprints(load_pipeline(toy.file, settings=["stages.prune.matrix.sparsity=[0.25, 0.6]"]))
    assert after["prune[sparsity=0.25]"] == before["prune[sparsity=0.25]"]
    assert after["int8[prune[sparsity=0.25]]"] == before["int8[prune[sparsity=0.25]]"]


def test_the_source_of_the_users_module_is_part_of_identity(toy):
    before = fingerprints(load_pipeline(toy.file))
    toy.module.write_text(toy.module.read_text() + "\n\n# a remark\n")
    assert changed(before, fingerprints(load_pipeline(toy.file))) == EVERYTHING


def test_so_is_what_the_module_imports_even_inside_a_function(toy):
    (toy.folder / "layers.py").write_text("WIDTH = 8\n")
    toy.module.write_text(
        toy.module.read_text() + "\n\ndef helper():\n    from layers import WIDTH\n    return WIDTH\n"
    )
    before = fingerprints(load_pipeline(toy.file))
    (toy.folder / "layers.py").write_text("WIDTH = 9\n")
    assert changed(before, fingerprints(load_pipeline(toy.file))) == EVERYTHING


def test_so_is_that_of_an_optimizer_by_import_path(toy):
    (toy.folder / "mine.py").write_text("from torch.optim import SGD\n\n\nclass Mine(SGD): ...\n")
    setting = "stages.train.config.optimizer={name: 'mine:Mine', lr: 0.1}"
    before = fingerprints(load_pipeline(toy.file, settings=[setting]))
    (toy.folder / "mine.py").write_text("from torch.optim import Adam\n\n\nclass Mine(Adam): ...\n")
    after = fingerprints(load_pipeline(toy.file, settings=[setting]))
    assert changed(before, after) == EVERYTHING - {"search"}


def test_but_not_a_module_that_nothing_imports(toy):
    before = fingerprints(load_pipeline(toy.file))
    (toy.folder / "notebook.py").write_text("print('hello')\n")
    assert fingerprints(load_pipeline(toy.file)) == before


# --- YAML and Python -------------------------------------------------------------------------------


def in_python(folder: Path, **fields) -> Pipeline:
    """The toy pipeline, written in Python with functions and config objects."""
    toy = importlib.import_module("toy")
    return Pipeline(
        name="toy",
        task=Task(model=toy.build_model, data=toy.build_data, metrics=[toy.accuracy]),
        stages=(
            Stage(
                "search",
                TuneConfig(
                    algorithm="bayesian",
                    trials=4,
                    space={"optimizer.lr": {"loguniform": (0.001, 0.1)}, "model_args.width": {"choice": [8, 16]}},
                    train=TrainConfig(epochs=2),
                ),
            ),
            Stage("train", TrainConfig(epochs=3), inputs={"params": "search"}),
            Stage("prune", PruneConfig(finetune_epochs=1), inputs={"model": "train"}, matrix={"sparsity": [0.25, 0.5]}),
            Stage("student", DistillConfig(model_args={"width": 4}, epochs=2), inputs={"teacher": "train"}),
            Stage("int8", uses="quantize", inputs={"model": ["train", "prune", "student"]}),
            Stage(
                "best",
                SelectConfig(max_drop={"val_accuracy": 0.1}),
                inputs={"baseline": "train", "candidates": ("train", "prune", "student", "int8")},
            ),
        ),
        root=folder,
        **fields,
    )


def test_yaml_and_python_give_equal_objects_and_fingerprints(toy, monkeypatch):
    monkeypatch.syspath_prepend(toy.folder)
    from_python, from_yaml = in_python(toy.folder), load_pipeline(toy.file)
    assert from_python == from_yaml
    assert fingerprints(from_python) == fingerprints(from_yaml)
    assert plan(from_python).fingerprint == plan(from_yaml).fingerprint


def test_so_they_do_with_every_other_key(toy, monkeypatch):
    monkeypatch.syspath_prepend(toy.folder)
    document = toy.document
    document["task"]["metrics"] = [{"reference": "toy:accuracy", "mode": "min"}]
    document |= {"seed": 3, "storage": "runs", "tracking": {"experiment": "digits"}}
    document["stages"] = [
        {
            "name": "train",
            "uses": "train",
            "config": {"optimizer": {"name": "sgd", "momentum": 0.9}},
            "resources": {"workers": 2},
            "retries": 1,
        }
    ]
    toy_module = importlib.import_module("toy")
    config = TrainConfig(optimizer={"name": "sgd", "momentum": 0.9})
    from_python = Pipeline(
        name="toy",
        task=Task(
            model=toy_module.build_model,
            data=toy_module.build_data,
            metrics=[MetricRef(reference=toy_module.accuracy, mode="min")],
        ),
        stages=(Stage("train", config, resources=Resources(workers=2), retries=1),),
        seed=3,
        storage="runs",
        tracking=Tracking(experiment="digits"),
        root=toy.folder,
    )
    from_yaml = load_pipeline(toy.write(document))
    assert from_python == from_yaml
    assert fingerprints(from_python) == fingerprints(from_yaml)


# --- the words for a change ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ({"config": {"sparsity": 0.5}}, {"config": {"sparsity": 0.6}}, ["config.sparsity 0.5 -> 0.6"]),
        (
            {"config": {"optimizer": {"lr": 0.1, "name": "adam"}}},
            {"config": {"optimizer": {"lr": 0.2, "name": "sgd"}}},
            ["config.optimizer.lr 0.1 -> 0.2", "config.optimizer.name adam -> sgd"],
        ),
        ({"config": {"skip": []}}, {"config": {"skip": ["stem"]}}, ['config.skip [] -> ["stem"]']),
        ({"config": {}}, {"config": {"epochs": 3}}, ["config.epochs nothing -> 3"]),
        ({"seed": 0}, {"seed": 1}, ["seed 0 -> 1"]),
        ({"version": 1}, {"version": 2}, ["version 1 -> 2"]),
        ({"task": {"loss": "a:b"}}, {"task": {"loss": "a:c"}}, ["task.loss a:b -> a:c"]),
        (
            {"sources": {"a.py": "1", "b.py": "1", "c.py": "1"}},
            {"sources": {"a.py": "2", "c.py": "1", "d.py": "1"}},
            ["a.py changed", "b.py is gone", "d.py is new"],
        ),
        ({"inputs": {"model": ["old"]}}, {"inputs": {"model": ["new"]}}, ["model: train changed"]),
        ({"inputs": {"model": ["new"]}}, {"inputs": {"model": ["new", "more"]}}, ["model: student is new"]),
        ({"inputs": {"model": ["new", "more"]}}, {"inputs": {"model": ["new"]}}, ["model: student is gone"]),
        (
            {"inputs": {"model": ["?"]}},
            {"inputs": {"model": ["new"]}},
            ["model: train is new", "model: an input is gone"],
        ),
        ({"config": {"x": 1}}, {"config": {"x": 1.0}}, []),
    ],
)
def test_a_change_is_told_in_the_users_words(old, new, words):
    assert explain_change(old, new, names={"old": "train", "new": "train", "more": "student"}) == words


def test_a_long_value_is_cut_short():
    (text,) = explain_change({"config": {"x": "a" * 100}}, {"config": {"x": "b"}})
    assert text == f"config.x {'a' * 57}... -> b"
