"""Speed: all models that wait for it are measured in one go, and one that cannot be does not disturb the others."""

import shutil

import pytest

from heliostat.stages import measure
from heliostat.stages.measure import Speed, Subject, measure_speeds


@pytest.fixture
def subjects(bench, trained):
    pruned = bench.run("prune", {"sparsity": 0.5}, model=trained)
    return [
        Subject(trained.folder, trained.record.params, "train"),
        Subject(pruned.folder, pruned.record.params, "structured", source=trained.folder),
    ]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(measure, "SECONDS_PER_BATCH_SIZE", 0.01)


def test_models_are_measured_in_one_session_and_compared_with_where_they_came_from(bench, subjects):
    plain, pruned = measure_speeds(subjects, bench.task)
    assert plain.details.keys() == {"session"}
    assert pruned.details["session"] == plain.details["session"]
    for suffix in ("", "_b32"):
        ratio = plain.metrics[f"latency_ms{suffix}"] / pruned.metrics[f"latency_ms{suffix}"]
        assert pruned.details[f"speedup{suffix}"] == pytest.approx(ratio)
    on_all = {f"{name}_all_threads" for name in ("latency_ms", "latency_ms_b32", "throughput_per_s")}
    assert on_all < plain.metrics.keys()
    assert 0 <= plain.metrics["peak_memory_mb"] < 100


def test_a_model_that_does_not_load_is_named_and_the_others_are_measured(bench, subjects):
    broken = bench.store / "broken"
    shutil.copytree(subjects[0].folder, broken)
    (broken / "weights.pt").write_bytes(b"")
    speeds = measure_speeds([*subjects, Subject(broken, subjects[0].params, "train")], bench.task)
    assert [type(speed) for speed in speeds] == [Speed, Speed, str]
    assert "weights.pt" in speeds[2]


def test_models_too_large_to_be_loaded_at_once_are_measured_in_groups(bench, subjects, monkeypatch):
    monkeypatch.setattr(measure, "LOADED_AT_ONCE_MB", 0.0)
    plain, pruned = measure_speeds(subjects, bench.task)
    assert pruned.details["session"] == plain.details["session"]
    assert pruned.details["speedup"] > 0
