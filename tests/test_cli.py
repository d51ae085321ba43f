"""The command line without a Ray: help, plan, the history of a store, init, and what the exit codes say."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from heliostat.core.artifact import Record, read_record, records, write_record
from heliostat.report.runs import write_run

COMMANDS = ["run", "plan", "runs", "show", "ui", "submit", "sync", "doctor", "init", "cluster"]


def test_help_names_every_command_and_what_it_does(heliostat):
    done = heliostat("--help")
    assert done.returncode == 0
    for command in COMMANDS:
        assert re.search(rf"^\W*{command} +\w", done.stdout, re.MULTILINE), command


def test_without_a_command_the_help_is_shown(heliostat):
    assert "Usage:" in heliostat().stderr


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_every_command_explains_its_options(heliostat, option):
    done = heliostat("run", option)
    for word in ("FILE", "--set", "--address", "--force", "--json"):
        assert word in done.stdout


@pytest.mark.parametrize(
    "arguments", [["rnu"], ["plan"], ["plan", "a.yaml", "--jsn"], ["cluster", "validat"]], ids=" ".join
)
def test_a_command_line_that_is_wrong_ends_with_2(heliostat, arguments):
    done = heliostat(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_help_imports_nothing_heavy():
    script = (
        "import sys, heliostat.cli\n"
        "try: heliostat.cli.app(['--help'])\n"
        "except SystemExit: pass\n"
        "print('heavy:', *({'torch', 'ray', 'mlflow', 'pandas', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("heavy:")


# --- plan ------------------------------------------------------------------------------------------


WITHOUT_TORCH = """
def build_model(width=8, bias=True): ...
def build_data(): ...
def loss(outputs, targets): ...
def accuracy(outputs, targets): ...
"""


@pytest.fixture
def file(toy) -> Path:
    """The toy pipeline over a module that imports nothing, so that a process can plan it at once."""
    toy.module.write_text(WITHOUT_TORCH)
    document = toy.document
    document["task"]["loss"] = "toy:loss"
    return toy.write(document)


def test_plan_shows_every_node_why_it_runs_and_how_much_work_that_is(file, heliostat):
    done = heliostat("plan", file)
    assert done.returncode == 0, done.stderr
    for node in ("search", "prune[sparsity=0.25]", "int8[prune[sparsity=0.5]]", "best"):
        assert re.search(rf"^ *{re.escape(node)} .*\brun\b.* first run", done.stdout, re.MULTILINE), node
    assert "4 trials, 8 epochs" in done.stdout
    assert "10 nodes to run, 4 trials, at most 15 epochs; no earlier run to estimate from" in done.stdout
    assert not (file.parent / ".heliostat").exists()


def test_plan_prints_one_json_document_and_nothing_else(file, heliostat):
    done = heliostat("plan", file, "--json", "--set", "stages.search.config.trials=9")
    document = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert document["pipeline"] == "toy"
    assert document["nodes"][0]["trials"] == 9
    assert {node["status"] for node in document["nodes"]} == {"run"}
    assert document["fits"] == {"ok": True, "reason": None}


def test_what_the_users_module_prints_stays_out_of_the_json_document(file, heliostat):
    module = file.parent / "toy.py"
    module.write_text(module.read_text() + '\nprint("hello from the module")\n')
    done = heliostat("plan", file, "--json")
    assert json.loads(done.stdout)["pipeline"] == "toy"
    assert "hello from the module" in done.stderr


def test_what_can_never_fit_is_planned_and_then_refused_with_3(file, heliostat):
    done = heliostat("plan", file, "--json", "--set", "stages.train.resources.workers=4096")
    assert done.returncode == 3
    assert json.loads(done.stdout)["fits"]["ok"] is False
    assert "error: train: needs 4096 CPUs at once; this machine has" in done.stderr


def test_a_run_of_trials_that_can_never_fit_is_refused_with_3_before_anything_starts(file, heliostat):
    done = heliostat("run", file, "--json", "--set", "stages.search.resources.workers_per_trial=4096")
    assert (done.returncode, done.stdout) == (3, "")
    assert "error: search: needs 4096 CPUs at once; this machine has" in done.stderr
    assert not list((file.parent / ".heliostat").glob("runs/*"))


def test_a_trial_again_goes_with_no_force(file, heliostat):
    done = heliostat("run", file, "--trial", "0001", "--force", "search")
    assert done.returncode == 2
    assert "error: --force: a trial that is run again changes nothing" in done.stderr


# --- the history of a store ------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path) -> Path:
    """A store in the working directory with a run of two nodes, one of which failed."""
    store = tmp_path / ".heliostat"
    folder = store / "toy" / "train" / "aaaa1111bbbb2222"
    folder.mkdir(parents=True)
    record = Record(
        kind="model",
        pipeline="toy",
        node="train",
        stage="train",
        uses="train",
        fingerprint=folder.name,
        identity={},
        metrics={"val_accuracy": 0.97456},
        params={"train": {"epochs": 3}},
        started_at="2024-01-01T00:00:00+00:00",
    )
    write_record(folder, record)
    nodes = [
        {"name": "train", "status": "ran", "seconds": 1.5, "path": str(folder)},
        {
            "name": "prune[sparsity=0.5]",
            "status": "failed",
            "seconds": 0.5,
            "path": str(store / "x"),
            "error": "no layer",
        },
    ]
    write_run(store, "toy-20240101-000000", {"status": "failed", "nodes": nodes, "selected": None})
    return store


def test_runs_lists_what_happened(store, heliostat):
    done = heliostat("runs")
    assert done.returncode == 0
    assert re.search(r"toy-20240101-000000 +failed +1 ran, 1 failed", done.stdout)
    assert [run["run"] for run in json.loads(heliostat("runs", "--json").stdout)] == ["toy-20240101-000000"]


@pytest.mark.parametrize("arguments", [["runs"], ["runs", "--json"], ["show", "train"], ["ui"], ["sync"]])
def test_a_command_that_reads_a_store_in_the_wrong_folder_ends_with_2_and_names_the_nearest_store(
    store, heliostat, arguments
):
    (store.parent / "project").mkdir()
    store.rename(store.parent / "project" / ".heliostat")
    done = heliostat(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    looked = f"error: --storage .heliostat: {store} is no such folder; try --storage project/.heliostat"
    assert done.stderr.strip() == looked
    below = heliostat(*arguments, cwd=store.parent / "project" / ".heliostat" / "toy")
    assert below.returncode == 2
    assert f"try --storage {store.parent / 'project' / '.heliostat'}" in below.stderr


def test_a_folder_that_is_no_store_is_refused_with_what_to_pass(heliostat, tmp_path):
    done = heliostat("runs", "--storage", tmp_path)
    assert done.returncode == 2
    assert f"error: --storage {tmp_path}: {tmp_path} is not a store: no run has written here; go to" in done.stderr


def test_a_store_without_runs_yet_has_none(heliostat, tmp_path):
    (tmp_path / ".heliostat" / "runs").mkdir(parents=True)
    done = heliostat("runs", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, [])


def test_show_tells_a_run_with_its_nodes(store, heliostat):
    done = heliostat("show", "toy-20240101-000000")
    assert "toy-20240101-000000: failed" in done.stdout
    assert re.search(r"prune\[sparsity=0\.5\] +failed", done.stdout)
    assert "prune[sparsity=0.5] failed: no layer" in done.stdout


@pytest.mark.parametrize("name", ["train", "aaaa1111", ".heliostat/toy/train/aaaa1111bbbb2222"])
def test_show_tells_a_node_by_name_fingerprint_or_folder(store, heliostat, name):
    done = heliostat("show", name)
    assert done.returncode == 0, done.stderr
    assert "train (train), 2024-01-01T00:00:00+00:00" in done.stdout
    assert re.search(r"val_accuracy +0\.9746", done.stdout)
    document = json.loads(heliostat("show", name, "--json").stdout)
    assert (document["node"], document["metrics"]["val_accuracy"]) == ("train", 0.97456)


def test_show_tells_the_front_of_a_search_for_several_objectives(store, heliostat):
    front = [
        {"trial": "0003", "val_accuracy": 0.97, "latency_ms": 1.5},
        {"trial": "0007", "val_accuracy": 0.9, "latency_ms": 0.5},
    ]
    (folder := store / "toy" / "search" / "cccc1111dddd2222").mkdir(parents=True)
    search = Record("params", "toy", "search", "search", "tune", folder.name, identity={}, details={"front": front})
    write_record(folder, search)
    said = heliostat("show", "search").stdout
    assert re.search(r"trial +val_accuracy +latency_ms", said)
    assert re.search(r"0003 +0\.97 +1\.5", said)
    assert re.search(r"0007 +0\.9 +0\.5", said)


def test_show_of_what_is_not_there_ends_with_2_and_the_nearest_name(store, heliostat):
    done = heliostat("show", "trian")
    assert (done.returncode, done.stdout) == (2, "")
    assert "has no run or node 'trian'; did you mean 'train'?" in done.stderr


def test_show_knows_no_copies_of_records_among_the_artifacts_of_mlflow(store, heliostat):
    copy = store / "mlartifacts" / "0123456789abcdef" / "artifacts"
    copy.mkdir(parents=True)
    written = read_record(store / "toy" / "train" / "aaaa1111bbbb2222")
    write_record(copy, replace(written, started_at="2024-01-02T00:00:00+00:00"))
    assert [folder.name for folder, _ in records(store)] == ["aaaa1111bbbb2222"]
    assert json.loads(heliostat("show", "train", "--json").stdout)["path"] == ".heliostat/toy/train/aaaa1111bbbb2222"
    assert heliostat("show", copy).returncode == 2


def test_ui_of_a_store_without_history_ends_with_2(store, heliostat):
    done = heliostat("ui")
    assert done.returncode == 2
    assert "no run of this store is tracked in it (mlflow.db is missing)" in done.stderr


# --- init ------------------------------------------------------------------------------------------


def test_init_writes_a_project_and_says_what_to_type_next(heliostat, tmp_path):
    done = heliostat("init", "digits")
    assert done.returncode == 0, done.stderr
    written = {path.name for path in (tmp_path / "digits").iterdir()}
    assert written == {"pipeline.yaml", "predict.py", "task.py"}
    assert done.stdout.splitlines()[-1] == "next: heliostat run digits/pipeline.yaml"


def test_init_overwrites_nothing(heliostat, tmp_path):
    heliostat("init", "digits")
    task = tmp_path / "digits" / "task.py"
    task.write_text("# mine\n")
    done = heliostat("init", "digits")
    assert done.returncode == 2
    assert "is there already; name a new folder" in done.stderr
    assert task.read_text() == "# mine\n"


def test_init_into_a_file_is_refused(heliostat, tmp_path):
    (tmp_path / "digits").write_text("")
    done = heliostat("init", "digits")
    assert (done.returncode, "is a file, not a folder" in done.stderr) == (2, True)


# --- cluster ---------------------------------------------------------------------------------------


def test_cluster_validate_says_what_it_found_or_what_is_wrong(heliostat, tmp_path):
    shipped = Path(__file__).parents[1] / "cluster" / "local.yaml"
    assert heliostat("cluster", "validate", shipped).returncode == 0
    broken = tmp_path / "broken.yaml"
    broken.write_text(shipped.read_text().replace("cluster_name:", "cluster_nmae:"))
    done = heliostat("cluster", "validate", broken)
    assert done.returncode == 2
    assert "cluster_name" in done.stderr
