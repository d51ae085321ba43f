"""Choosing: by validation and cost, never by the test split; the record has a verdict on everyone."""

import pytest

from heliostat.errors import StageError

BASE = {
    "val_accuracy": 0.95,
    "val_loss": 0.2,
    "test_accuracy": 0.94,
    "latency_ms": 2.0,
    "size_mb": 8.0,
    "num_params": 1000.0,
}


@pytest.fixture
def model(bench):
    """A function that makes an artifact with a file and metrics, those of the baseline but for what is given."""

    def make(name: str, **metrics: float):
        folder = bench.store / name
        folder.mkdir(parents=True)
        (folder / "weights.pt").write_text(name)
        (folder / "code").mkdir()
        (folder / "code/toy.py").write_text("")
        return bench.keep(
            name, files=["weights.pt", "code/toy.py"], metrics={**BASE, **metrics}, params={"train": {"epochs": 3}}
        )

    return make


def test_the_cheapest_within_the_limit_is_chosen_and_copied(bench, model):
    base, small = model("train"), model("small", val_accuracy=0.945, latency_ms=1.0, size_mb=2.0)
    broken = model("tiny", val_accuracy=0.5, latency_ms=0.1, size_mb=0.1)
    best = bench.run("select", {"max_drop": {"val_accuracy": 0.01}}, baseline=base, candidates=[base, small, broken])
    assert best.record.details["chosen"] == "small"
    assert (best.folder / "weights.pt").read_text() == "small"
    assert (best.folder / "code/toy.py").is_file()
    assert best.metrics == small.metrics
    assert best.record.params == small.record.params


def test_the_table_says_of_everyone_why(bench, model):
    base, small = model("train"), model("small", latency_ms=1.0, size_mb=2.0)
    broken = model("tiny", val_accuracy=0.5, latency_ms=0.1, size_mb=0.1)
    best = bench.run("select", {"max_drop": {"val_accuracy": 0.01}}, baseline=base, candidates=[small, broken])
    rows = {row["model"]: row for row in best.record.details["table"]}
    assert list(rows) == ["train", "small", "tiny"]
    assert [row["chosen"] for row in rows.values()] == [False, True, False]
    assert (rows["small"]["speed_up"], rows["small"]["size_ratio"]) == (2.0, 0.25)
    assert "dropped val_accuracy by 0.45 > 0.01" in rows["tiny"]["why"]
    assert "dominated by small" in rows["train"]["why"]


def test_models_whose_intervals_overlap_are_not_called_different(bench, model):
    base = model("train", val_accuracy_low=0.93, val_accuracy_high=0.97)
    near = model("near", val_accuracy=0.92, val_accuracy_low=0.90, val_accuracy_high=0.94)
    far = model("far", val_accuracy=0.80, val_accuracy_low=0.76, val_accuracy_high=0.84)
    best = bench.run("select", baseline=base, candidates=[near, far])
    assert [row["quality"] for row in best.record.details["table"]] == [
        {"val_accuracy": "not told apart"},
        {"val_accuracy": "not told apart"},
        {"val_accuracy": "worse"},
    ]


def test_test_figures_choose_nothing(bench, model):
    base = model("train")
    lucky = model("lucky", test_accuracy=1.0, latency_ms=1.9)
    plain = model("plain", test_accuracy=0.0, latency_ms=1.0)
    best = bench.run("select", {"max_drop": {"val_accuracy": 0.0}}, baseline=base, candidates=[lucky, plain])
    assert best.record.details["chosen"] == "plain"
    assert best.metrics["test_accuracy"] == 0.0


def test_when_nobody_is_good_enough_the_baseline_stays(bench, model):
    base, broken = model("train"), model("tiny", val_accuracy=0.1, size_mb=0.1)
    best = bench.run("select", {"max_drop": {"val_accuracy": 0.01}}, baseline=base, candidates=[broken])
    assert best.record.details["chosen"] == "train"


def test_a_loss_may_rise_by_what_is_allowed_as_an_accuracy_may_drop(bench, model):
    base, worse = model("train"), model("worse", val_loss=0.9, size_mb=0.1, latency_ms=0.1)
    best = bench.run("select", {"max_drop": {"val_loss": 0.1}}, baseline=base, candidates=[worse])
    assert best.record.details["chosen"] == "train"
    (_, row) = best.record.details["table"]
    assert "raised val_loss" in row["why"]


def test_a_baseline_that_was_not_measured_fails_the_stage(bench, model):
    base = model("train", latency_ms=float("nan"))
    with pytest.raises(StageError, match="the baseline train: latency_ms is nan"):
        bench.run("select", baseline=base, candidates=[model("small")])


def test_what_is_too_large_or_too_slow_is_not_chosen_and_the_table_says_so(bench, model):
    base, small = model("train"), model("small", latency_ms=1.0, size_mb=2.0)
    large = model("large", latency_ms=0.5, size_mb=2.1)
    limits = {"max_size_mb": 2.0, "max_latency_ms": 1.0}
    best = bench.run("select", limits, baseline=base, candidates=[small, large])
    rows = {row["model"]: row["why"] for row in best.record.details["table"]}
    assert best.record.details["chosen"] == "small"
    assert (rows["train"], rows["large"]) == ("size_mb 8 > 2, latency_ms 2 > 1", "size_mb 2.1 > 2")


def test_when_nobody_is_within_the_limits_the_closest_is_named(bench, model):
    base, small = model("train"), model("small", size_mb=2.0)
    with pytest.raises(StageError, match="none of 2 models is within the limits; the closest is small: size_mb 2 > 1"):
        bench.run("select", {"max_size_mb": 1.0}, baseline=base, candidates=[small])
