"""When speed is measured: of all that wait for it together, and again where figures that are compared were not."""

import json

import pytest


def records(store):
    found = [json.loads(path.read_text()) for path in store.glob("toy/*/*/record.json")]
    return {record["node"]: record for record in found}


@pytest.fixture(scope="module")
def cut_off(finished, tmp_path_factory, heliostat_in):
    """A copy of the finished run as if it had been cut off before the student was measured; then the same command."""
    import shutil

    folder = tmp_path_factory.mktemp("cut") / "toy"
    shutil.copytree(finished.folder, folder, ignore=shutil.ignore_patterns(".git"))
    store = folder / ".heliostat"
    for path in store.glob("toy/student/*/record.json"):
        record = json.loads(path.read_text())
        record["metrics"] = {k: v for k, v in record["metrics"].items() if "latency" not in k and "per_s" not in k}
        del record["details"]["speed"]
        path.write_text(json.dumps(record))
    shutil.rmtree(store / "toy" / "best")
    before = records(store)
    cli = heliostat_in(folder)
    planned = json.loads(cli("plan", "toy.yaml", "--json").stdout)
    return before, planned, cli("run", "toy.yaml", "--json"), store


def test_models_of_one_run_are_measured_together(finished):
    models = [node for node in finished.nodes if node not in {"search", "best"}]
    sessions = {finished.record(node)["details"]["speed"]["session"] for node in models}
    assert len(sessions) == 1


def test_a_plan_says_that_only_speed_is_left_to_be_measured(cut_off):
    _, planned, _, _ = cut_off
    (student,) = [node for node in planned["nodes"] if node["name"] == "student"]
    assert student["status"] == "reuse"
    assert student["reason"].endswith("its speed is left to be measured")


def test_a_model_that_was_made_is_not_made_again_to_be_measured(cut_off):
    before, _, process, store = cut_off
    assert process.returncode == 0, process.stderr
    nodes = {node["name"]: node for node in json.loads(process.stdout)["nodes"]}
    assert {name for name, node in nodes.items() if node["status"] != "reused"} == {"best"}
    student = records(store)["student"]
    assert student["metrics"]["latency_ms"] == nodes["student"]["metrics"]["latency_ms"] > 0
    assert student["details"]["history"] == before["student"]["details"]["history"]


def test_what_was_not_measured_together_is_measured_again_to_be_compared(cut_off):
    _, _, _, store = cut_off
    after = records(store)
    own = after["train"]["metrics"]
    table = {row["model"]: row for row in after["best"]["details"]["table"]}
    timed = {name: ms for name, ms in table["train"]["metrics"].items() if name.startswith("latency_ms")}
    assert len(timed) > 2
    assert timed != {name: own[name] for name in timed}  # one figure alone may come out the same
    ratio = table["train"]["metrics"]["latency_ms"] / table["student"]["metrics"]["latency_ms"]
    assert table["student"]["speed_up"] == pytest.approx(ratio, rel=1e-5)
