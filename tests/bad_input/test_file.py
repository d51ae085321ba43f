"""A file that is no pipeline: no YAML, unknown keys, wrong values, missing ones, unsafe names."""

import pytest

from heliostat.core.load import load_pipeline
from heliostat.core.tracking_uri import check_place
from heliostat.errors import SpecError


def test_a_file_that_is_not_there_is_refused_with_the_nearest_one(toy):
    with pytest.raises(SpecError, match=r"toi\.yaml: no such file; did you mean 'toy\.yaml'\?"):
        load_pipeline(toy.folder / "toi.yaml")


def test_a_folder_is_no_pipeline_file(toy):
    with pytest.raises(SpecError, match="is not a file"):
        load_pipeline(toy.folder)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("name: [toy\n", "line 2, column 1: not YAML: expected ',' or ']'", id="open-bracket"),
        pytest.param("a: b: c\n", "line 1, column 5: not YAML: mapping values are not allowed here", id="two-colons"),
        pytest.param("\0", "not YAML: unacceptable character", id="binary"),
        pytest.param("a: !!python/object/apply:os.getcwd []\n", "line 1, column 4: not YAML: could", id="python-tag"),
        pytest.param("name: toy\ntask:\n\tmodel: x\n", "line 3, column 1: a tab; YAML indents with spaces", id="tab"),
        pytest.param("name: a\nname: b\n", "line 2: duplicate key 'name'; it is on line 1 already", id="duplicate"),
        pytest.param("task:\n  model: a\n  model: b\n", "line 3: duplicate key 'model'", id="nested-duplicate"),
        pytest.param("", "holds NoneType, not a mapping with `name`, `task` and `stages`", id="empty"),
        pytest.param("- train\n", "holds list, not a mapping", id="list"),
    ],
)
def test_what_is_no_mapping_in_yaml_is_refused_with_its_line(toy, refusal, text, expected):
    assert f"{toy.file}: {expected}" in str(refusal(text=text))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"stagess": []}, "stagess: unknown field; did you mean 'stages'?"),
        ({"default": {}}, "default: unknown field; did you mean 'defaults'?"),
        ({"root": "/"}, "root: unknown field; known: defaults, name, seed, stages, storage, task, tracking"),
        ({"task/modle": "toy:x"}, "task.modle: unknown field; did you mean 'model'?"),
        (
            {"task/metrics": [{"reference": "toy:accuracy", "mod": "max"}]},
            "task.metrics[0].mod: unknown field; did you mean 'mode'?",
        ),
        ({"stages/train/input": {}}, "stages[1] (train).input: unknown field; did you mean 'inputs'?"),
        (
            {"stages/prune/config/sparsty": 0.5},
            "stages[2] (prune).config.sparsty: unknown field; did you mean 'sparsity'?",
        ),
        (
            {"stages/search/config/train/epoch": 2},
            "stages[0] (search).config.train.epoch: unknown field; did you mean 'epochs'?",
        ),
        (
            {"stages/search/config/scheduler": {"asha": {"grace_epoch": 1}}},
            "stages[0] (search).config.scheduler.asha.grace_epoch: unknown field; did you mean 'grace_epochs'?",
        ),
        (
            {"stages/train/config/optimizer": {"learning_rate": 1}},
            "stages[1] (train).config.optimizer.learning_rate: unknown field; known: betas, eps, lr, momentum,",
        ),
        (
            {"stages/train/resources": {"worker": 2}},
            "stages[1] (train).resources.worker: unknown field; did you mean 'workers'?",
        ),
        ({"tracking": {"url": "x"}}, "tracking.url: unknown field; did you mean 'uri'?"),
        (
            {"stages/prune/matrix": {"sparsty": [0.1]}},
            "stages[2] (prune).matrix.sparsty: unknown field 'sparsty'; did you mean 'sparsity'?",
        ),
        (
            {"stages/prune/matrix": {"optimizer.lrr": [0.1]}},
            "stages[2] (prune).matrix.optimizer.lrr: unknown field 'lrr'; did you mean 'lr'?",
        ),
        ({"defaults": {"trian": {}}}, "defaults.trian: no stage uses 'trian'; did you mean 'train'?"),
        (
            {"defaults": {"train": {"confg": {}}}},
            "defaults.train.confg: unknown field; did you mean 'config'?",
        ),
        (
            {"defaults": {"train": {"config": {"epoch": 3}}}},
            "stages[1] (train).config.epoch: unknown field; did you mean 'epochs'?",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_unknown_key_is_refused_at_every_level(refusal, changes, expected):
    assert expected in str(refusal(changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"name": 3}, "name: input should be a valid string, not 3"),
        ({"seed": "x"}, "seed: input should be a valid integer, not 'x'"),
        ({"task": "toy"}, "task: input should be a mapping, not 'toy'"),
        ({"task/metrics": "toy:accuracy"}, "task.metrics: input should be a list, not 'toy:accuracy'"),
        ({"stages": {"train": {}}}, "stages: input should be a list, not {'train': {}}"),
        ({"stages": ["train"]}, "stages[0]: input should be a mapping, not 'train'"),
        ({"stages": []}, "stages: empty; name at least one"),
        ({"tracking": [1]}, "tracking: input should be a mapping, not [1]"),
        ({"defaults": [1]}, "defaults: [1] is not a mapping"),
        ({"stages/prune/inputs": "train"}, "stages[2] (prune).inputs: input should be a mapping, not 'train'"),
        ({"stages/prune/inputs": {"model": 3}}, "stages[2] (prune).inputs.model: input should be a list, not 3"),
        ({"stages/prune/config": [1]}, "stages[2] (prune).config: input should be a mapping, not [1]"),
        ({"stages/prune/matrix": {"sparsity": 0.5}}, "stages[2] (prune).matrix.sparsity: input should be a list"),
        ({"stages/prune/matrix": {"sparsity": []}}, "stages[2] (prune).matrix.sparsity: empty; name at least one"),
        (
            {"stages/prune/matrix": {"sparsity": [0.1, 1.5]}},
            "stages[2] (prune).config.sparsity: input should be less than 1, not 1.5",
        ),
        ({"stages/train/config/epochs": "3"}, "stages[1] (train).config.epochs: input should be a valid integer"),
        ({"stages/train/config/epochs": True}, "stages[1] (train).config.epochs: input should be a valid integer"),
        (
            {"stages/train/config/optimizer": {"lr": -1}},
            "stages[1] (train).config.optimizer.lr: input should be greater than 0, not -1",
        ),
        (
            {"stages/train/config/optimizer": {"name": "adamm"}},
            "stages[1] (train).config.optimizer.name: unknown optimizer 'adamm'; did you mean 'adam'?",
        ),
        (
            {"stages/train/config/optimizer": {"name": "adam", "momentum": 0.9}},
            "stages[1] (train).config.optimizer: adam takes no 'momentum'; it takes betas, eps, lr, weight_decay",
        ),
        (
            {"stages/train/config/optimizer": {"name": "torch.optim:SGD", "options": {"momentom": 0.9}}},
            "stages[1] (train).config.optimizer: 'torch.optim:SGD' takes no argument 'momentom'; did you mean",
        ),
        (
            {"stages/train/config/scheduler": {"name": "cosin"}},
            "stages[1] (train).config.scheduler.name: unknown scheduler 'cosin'; did you mean 'cosine'?",
        ),
        (
            {"stages/train/config/scheduler": {"name": "StepLR", "options": {"step": 3}}},
            "stages[1] (train).config.scheduler.options: 'torch.optim.lr_scheduler:StepLR' takes no argument 'step'",
        ),
        (
            {"stages/train/config/scheduler": {"name": "StepLR", "warmup_epochs": 1}},
            "stages[1] (train).config.scheduler: warmup_epochs goes with constant, cosine, linear, not with StepLR",
        ),
        (
            {"stages/train/config/strategy": "single", "stages/train/resources": {"workers": 2}},
            "stages[1] (train).config.strategy: 'single' trains with one worker, not 2; take 'ddp' or 'auto'",
        ),
        (
            {"task/train_fn": "toy:one", "task/train_step": "toy:one"},
            "task: train_fn replaces the loop that would call train_step; give one of them",
        ),
        (
            {"task/train_step": "toy:one"},
            "task.train_step: 'toy:one' cannot be called so: too many positional arguments; "
            "it is called with (model, batch)",
        ),
        (
            {"stages/train/config/strategy": "dddp"},
            "config.strategy.name: 'dddp' is not one of auto, single, ddp, fsdp, tp, pp; did you mean 'ddp'?",
        ),
        (
            {"stages/search/config/trials": -3},
            "stages[0] (search).config.trials: input should be greater than or equal to 1, not -3",
        ),
        (
            {"stages/train/resources": {"gpus_per_worker": 1.5}},
            "stages[1] (train).resources.gpus_per_worker: 1.5 GPUs: a worker has a part of one GPU, or whole ones",
        ),
        (
            {"stages/train/resources": {"custom_resources": {"GPU": 1}}},
            "stages[1] (train).resources.custom_resources: GPU is no custom resource; set gpus_per_worker",
        ),
        (
            {"stages/train/resources": {"custom_resources": {"licence": 1.5}}},
            "stages[1] (train).resources.custom_resources: 1.5 of licence: Ray gives a part of one, or whole ones",
        ),
        (
            {"stages/train/resources": {"custom_resources": {"memory": 1}}},
            "stages[1] (train).resources.custom_resources: 'memory' is what Ray says of a node itself",
        ),
        (
            {"stages/train/resources": {"placement": "spred"}},
            "resources.placement: 'spred' is not one of pack, spread; did you mean 'spread'?",
        ),
        (
            {"stages/train/resources": {"workers": 0}},
            "stages[1] (train).resources.workers: input should be greater than or equal to 1, not 0",
        ),
        (
            {"stages/train/resources": {"workers": {"min": 4, "max": 1}}},
            "stages[1] (train).resources: workers: min 4 is more than max 1",
        ),
        (
            {"stages/train/resources": {"workers": {"min": 1, "maxx": 4}}},
            "stages[1] (train).resources: workers.maxx: unknown field; did you mean 'max'?",
        ),
        (
            {"stages/train/resources": {"workers": {"min": 1}}},
            "stages[1] (train).resources: workers: {'min': 1} is half of a range; write {min: 1, max: 4}",
        ),
        (
            {"stages/train/resources": {"workers": {"min": 2, "max": 4}}, "stages/train/config": {"strategy": "tp"}},
            "stages[1] (train).resources.workers: 'tp' may train otherwise with another number of them",
        ),
        ({"stages/train/retries": -1}, "stages[1] (train).retries: input should be greater than or equal to 0"),
        ({"storage": "ftp://host/runs"}, "storage: 'ftp://host/runs' is neither a folder nor s3://BUCKET/PREFIX"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_value_is_refused(refusal, changes, expected):
    assert expected in str(refusal(changes))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("name", "name: missing; it is required"),
        ("task", "task: missing; it is required"),
        ("stages", "stages: missing; it is required"),
        ("task/model", "task.model: missing; it is required"),
        ("task/data", "task.data: missing; it is required"),
        ("stages/train/name", "stages[1].name: missing; it is required"),
        ("stages/train/uses", "stages[1] (train).uses: missing; it is required"),
        ("stages/search/config/space", "stages[0] (search).config.space: missing; it is required"),
        (
            "stages/prune/inputs",
            "stages[2] (prune).inputs.model: missing; prune needs the name of a stage that makes a model",
        ),
    ],
)
def test_what_is_required_and_missing_is_named(refusal, path, expected):
    assert expected in str(refusal({path: ...}))


def test_all_faults_of_a_file_are_told_at_once(refusal):
    text = str(refusal({"stages/train/input": {}, "task/modle": "toy:x", "seed": "x"}))
    assert text.count("\n") == 2


@pytest.mark.parametrize("name", ["a/b", "a\\b", "..", "../up", ".hidden", "", " padded", "two\nlines", "x" * 101])
def test_a_name_that_is_no_safe_folder_is_refused(refusal, name):
    assert f"name: {name!r} cannot be the name of a folder" in str(refusal({"name": name}))
    assert f".name: {name!r} cannot be the name of a folder" in str(refusal({"stages/best/name": name}))


def bomb(start: str, repeated: str) -> str:
    """Each of 30 lines stands for ten times as much as the one before it."""
    lines = [f"a0: &a0 {start}"]
    for level in range(1, 30):
        items = ", ".join(repeated.replace("KEY", f"k{n}").replace("LAST", f"*a{level - 1}") for n in range(10))
        lines.append(f"a{level}: &a{level} " + (f"[{items}]" if "KEY" not in repeated else f"{{{items}}}"))
    return "\n".join(lines)


BOMBS = {
    "lists": bomb("[x]", "LAST"),
    "mappings": bomb("{k: x}", "KEY: LAST"),
    "merges": bomb("{k: x}", "KEY: {<<: LAST}"),
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_aliases_that_stand_for_billions_of_values_are_refused_before_any_is_built(refusal, text):
    assert "more than 100,000 values, with those that aliases repeat" in str(refusal(text=text))
    assert "--set task: line 6: more than 100,000 values" in str(refusal(settings=[f"task={text}"]))


def test_a_long_list_without_aliases_is_refused_too(refusal):
    assert "line 1: more than 100,000 values" in str(refusal(text=f"a: [{', '.join(['1'] * 100_001)}]"))


@pytest.mark.parametrize(
    "text",
    ["a: " + "[" * 5000, "a: " + "{b: " * 5000, "\n".join(f"{' ' * n}a:" for n in range(2000)), "- " * 5000 + "a"],
    ids=["lists", "mappings", "lines", "dashes"],
)
def test_what_nests_without_end_is_refused_in_files_and_values(refusal, text):
    assert "nested more than 50 levels deep; write it flatter" in str(refusal(text=text))
    assert "--set seed: line" in str(refusal(settings=[f"seed={text}"]))


def test_an_alias_inside_what_it_repeats_is_refused(refusal):
    assert "line 1: an alias stands inside what it repeats" in str(refusal(text="a: &a [1, *a]"))


def test_a_set_path_without_end_is_refused(refusal):
    assert "nested more than 50 levels deep; no field" in str(refusal(settings=[".".join("x" * 5000) + "=1"]))


def test_aliases_as_people_use_them_are_written_out(toy):
    toy.file.write_text(
        "defaults: {train: {config: &c {epochs: 2}}}\nname: toy\n"
        "task: {model: 'toy:build_model', data: 'toy:build_data'}\n"
        "stages: [{name: a, uses: train, config: *c}, {name: b, uses: train, config: {<<: *c, batch_size: 8}}]\n"
    )
    first, second = load_pipeline(toy.file).stages
    assert (first.config, second.config) == ({"epochs": 2}, {"epochs": 2, "batch_size": 8})


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("./mlruns", "MLflow no longer writes folders of files; write sqlite:///mlflow.db"),
        ("mlruns", "MLflow no longer writes folders of files"),
        ("/srv/mlruns", "MLflow no longer writes folders of files"),
        ("file:./mlruns", "MLflow no longer writes folders of files"),
        ("file:///srv/mlruns", "MLflow no longer writes folders of files"),
        ("C:\\runs\\mlruns", "MLflow no longer writes folders of files"),
        ("sqlite:mlflow.db", "an SQLite store is sqlite:///FILE"),
        ("sqlite://mlflow.db", "an SQLite store is sqlite:///FILE"),
        ("sqlite:///", "an SQLite store is sqlite:///FILE"),
        ("sqlite:///:memory:", "a store in memory ends with this process"),
        ("localhost:5000", "MLflow knows no store 'localhost'; write sqlite:///mlflow.db for a file"),
        ("http:/tracking:5000", "it names no host"),
        ("s3://bucket/mlflow", "MLflow knows no store 's3'"),
    ],
)
def test_a_tracking_store_that_mlflow_cannot_write_is_refused(refusal, monkeypatch, uri, expected):
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    message = str(refusal({"tracking/uri": uri}))
    assert message.startswith(f"tracking.uri: {uri!r}: ")
    assert expected in message


@pytest.mark.parametrize("uri", ["http://host:5000", "https://host", "postgresql+psycopg2://h/db", "databricks", "uc"])
def test_servers_and_databases_are_taken_as_they_are(toy, uri):
    assert load_pipeline(toy.write({**toy.document, "tracking": {"uri": uri}})).tracking_uri == uri


def test_a_relative_tracking_store_lies_beside_the_file_wherever_the_command_runs(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    document = {**toy.document, "tracking": {"uri": "sqlite:///history/runs.db"}}
    pipeline = load_pipeline(toy.write(document))
    assert pipeline.tracking_uri == f"sqlite:///{toy.folder / 'history' / 'runs.db'}"
    absolute = {**toy.document, "tracking": {"uri": f"sqlite:///{tmp_path / 'x.db'}"}}
    assert load_pipeline(toy.write(absolute)).tracking_uri == f"sqlite:///{tmp_path / 'x.db'}"
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    files = load_pipeline(toy.write({**toy.document, "tracking": {"uri": "./mlruns"}}))
    assert files.tracking_uri == f"file://{toy.folder / 'mlruns'}"


def test_an_sqlite_store_that_cannot_be_one_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("no database")
    with pytest.raises(SpecError, match=r"tracking\.uri: .*file is no SQLite database"):
        check_place(f"sqlite:///{tmp_path / 'file'}")
    with pytest.raises(SpecError, match=r"tracking\.uri: .*x\.db cannot be written: .*; name another file"):
        check_place(f"sqlite:///{tmp_path / 'file' / 'x.db'}")
    check_place(f"sqlite:///{tmp_path / 'new' / 'x.db'}")
    assert list((tmp_path / "new").iterdir()) == []
