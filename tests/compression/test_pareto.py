import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.compression.pareto import choose, told_apart
from heliostat.errors import SpecError, StageError

BASE = {"val_accuracy": 0.98, "test_accuracy": 0.97, "size_mb": 1.6, "latency_ms": 0.5}


def _row(accuracy, size, latency):
    return {"val_accuracy": accuracy, "test_accuracy": 0.99, "size_mb": size, "latency_ms": latency}


def _choose(candidates, **overrides):
    settings = {"max_drop": {"val_accuracy": 0.01}, "minimize": ["latency_ms", "size_mb"]} | overrides
    return choose(("train", BASE), candidates, **settings)


def _reasons(choice):
    return {verdict.name: verdict.reason for verdict in choice.verdicts}


def test_the_best_geometric_mean_within_the_limits_is_chosen():
    choice = _choose({"small": _row(0.975, 0.4, 0.45), "both": _row(0.972, 0.5, 0.2), "bad": _row(0.966, 0.01, 0.01)})
    assert choice.chosen == "both"
    scores = {v.name: v.score for v in choice.verdicts}
    assert scores["both"] == pytest.approx(math.sqrt((0.5 / 1.6) * (0.2 / 0.5)))
    assert scores["train"] == 1


def test_every_model_has_its_reason_in_words():
    candidates = {
        "winner": _row(0.975, 0.4, 0.2),
        "lossy": _row(0.966, 0.1, 0.1),
        "beaten": _row(0.974, 0.5, 0.3),
        "other": _row(0.979, 0.8, 0.3),
        "diverged": _row(math.nan, 0.1, 0.1),
        "unmeasured": {"val_accuracy": 0.98, "size_mb": 0.1},
    }
    choice = _choose(candidates)
    assert _reasons(choice) == {
        "train": "score 1 vs 0.316 of winner",
        "winner": "chosen: latency_ms 2.5x better, size_mb 4x better",
        "lossy": "dropped val_accuracy by 0.014 > 0.01",
        "beaten": "dominated by winner (better latency_ms, size_mb, val_accuracy)",
        "other": "score 0.548 vs 0.316 of winner",
        "diverged": "val_accuracy is nan",
        "unmeasured": "has no latency_ms",
    }
    assert {v.name for v in choice.verdicts if v.on_front} == {"train", "winner", "lossy", "other"}


def _between(row, low, high):
    return {**row, "val_accuracy_low": low, "val_accuracy_high": high}


@pytest.mark.parametrize(
    ("loser", "reason"),
    [
        (
            _between(_row(0.972, 0.5, 0.3), 0.96, 0.98),
            "dominated by winner (better latency_ms, size_mb; {} not told apart)",
        ),
        (_between(_row(0.972, 0.4, 0.2), 0.96, 0.98), "in nothing better than winner ({} not told apart)"),
        (_between(_row(0.972, 0.5, 0.2), 0.971, 0.973), "dominated by winner (better size_mb, {})"),
        (_row(0.972, 0.4, 0.2), "dominated by winner (better {})"),
    ],
    ids=["costs tell", "nothing tells", "intervals are apart", "without intervals"],
)
def test_two_models_whose_intervals_overlap_are_not_called_different(loser, reason):
    winner = _between(_row(0.978, 0.4, 0.2), 0.974, 0.982)
    assert _reasons(_choose({"winner": winner, "loser": loser}))["loser"] == reason.format("val_accuracy")


def test_the_baseline_is_always_there_and_wins_when_nothing_is_better():
    choice = _choose({"slower": _row(0.98, 1.7, 0.6)})
    assert choice.chosen == "train"
    assert "no candidate within the limits is better" in _reasons(choice)["train"]
    assert _choose({"train": BASE}).chosen == "train"
    assert len(_choose({"train": BASE}).verdicts) == 1


def test_a_drop_of_exactly_the_limit_is_within_it():
    assert _choose({"edge": _row(0.97, 0.1, 0.1)}).chosen == "edge"


def test_equal_costs_are_decided_by_quality_then_by_order():
    candidates = {"first": _row(0.975, 0.4, 0.2), "better": _row(0.976, 0.4, 0.2), "same": _row(0.976, 0.4, 0.2)}
    assert _choose(candidates).chosen == "better"


def test_a_metric_that_is_better_when_small_is_limited_upwards():
    base = {"val_loss": 0.1, "size_mb": 2.0}
    rows = {"worse": {"val_loss": 0.3, "size_mb": 0.5}, "fine": {"val_loss": 0.05, "size_mb": 1.0}}
    choice = choose(
        ("train", base), rows, max_drop={"val_loss": 0.1}, minimize=["size_mb"], directions={"val_loss": "min"}
    )
    assert choice.chosen == "fine"
    assert _reasons(choice)["worse"] == "raised val_loss by 0.2 > 0.1"


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ({"max_drop": {"test_accuracy": 0.01}}, "nothing is chosen by the test split"),
        ({"minimize": ["test_loss"]}, "nothing is chosen by the test split"),
        ({"max_drop": {"val_acuracy": 0.01}}, "did you mean 'val_accuracy'"),
        ({"minimize": ["latency"]}, "did you mean 'latency_ms'"),
        ({"minimize": []}, "minimize is empty"),
        ({"max_drop": {"val_accuracy": -0.1}}, "not 0 or more"),
        ({"max_drop": {"size_mb": 0.1}}, "both"),
    ],
)
def test_a_question_that_cannot_be_answered_is_refused(overrides, text):
    with pytest.raises(SpecError, match=text):
        _choose({"a": _row(0.98, 1, 1)}, **overrides)


def test_a_baseline_without_figures_is_an_error():
    with pytest.raises(StageError, match="the baseline train: val_accuracy is nan"):
        choose(("train", BASE | {"val_accuracy": math.nan}), {}, max_drop={"val_accuracy": 0.1}, minimize=["size_mb"])


ROWS = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=2),
    st.fixed_dictionaries({"cost": st.integers(1, 5), "gain": st.integers(1, 5)}),
    min_size=1,
)


@given(ROWS)
def test_the_chosen_model_is_on_the_front_and_never_worse_than_the_baseline(rows):
    name = next(iter(rows))
    choice = choose((name, rows[name]), rows, max_drop={"gain": 1}, minimize=["cost"])
    chosen = next(v for v in choice.verdicts if v.chosen)
    assert chosen.name == choice.chosen
    assert chosen.within_limits
    assert chosen.score <= 1


def test_of_two_intervals_apart_the_metrics_direction_says_which_is_better():
    high = {"val_x": 0.9, "val_x_low": 0.8, "val_x_high": 1.0}
    low = {"val_x": 0.5, "val_x_low": 0.4, "val_x_high": 0.6}
    assert told_apart(high, low, "val_x", mode="max") == told_apart(low, high, "val_x", mode="min") == "better"
    assert told_apart(low, high, "val_x", mode="max") == told_apart(high, low, "val_x", mode="min") == "worse"
    assert told_apart(high, {**low, "val_x_high": 0.8}, "val_x", mode="max") == "not told apart"
