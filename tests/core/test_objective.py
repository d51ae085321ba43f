"""What dominates what, which trials are on the front, and what a trial is judged by."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.core.objective import Bound, Objectives

TWO = Objectives.of({"gain": "max", "cost": "min"})
ROWS = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=2),
    st.fixed_dictionaries({"cost": st.integers(1, 5), "gain": st.integers(1, 5)}),
    min_size=1,
)


def dominates(one, other):
    return TWO.costs(one).dominates(TWO.costs(other))


@given(ROWS)
def test_the_front_is_what_nothing_dominates(rows):
    front = TWO.front(rows)
    assert front == [name for name in rows if not any(dominates(other, rows[name]) for other in rows.values())]
    for name in rows.keys() - set(front):
        assert any(dominates(rows[beater], rows[name]) for beater in front)


@given(ROWS)
def test_the_best_leads_in_the_first_objective_and_then_in_the_next_and_is_on_the_front(rows):
    best = rows[TWO.best(rows)]
    assert best["gain"] == max(row["gain"] for row in rows.values())
    assert best["cost"] == min(row["cost"] for row in rows.values() if row["gain"] == best["gain"])
    assert TWO.best(rows) in TWO.front(rows)


@given(ROWS)
def test_of_two_at_most_one_dominates_the_other(rows):
    for one in rows.values():
        assert not dominates(one, one)
        assert not any(dominates(one, other) and dominates(other, one) for other in rows.values())


def test_the_first_of_equals_is_the_best_and_of_none_there_is_no_best():
    assert TWO.best({"a": {"gain": 1, "cost": 1}, "b": {"gain": 1, "cost": 1}}) == "a"
    assert TWO.best({}) is None
    assert TWO.front({}) == []


@pytest.mark.parametrize("mode", ["max", "min"])
def test_the_earliest_of_equal_epochs_is_what_a_trial_is_judged_by(mode):
    rows = [{"a": 1.0, "epoch": 1}, {"a": 1.0, "epoch": 2}]
    assert Objectives.of({"a": mode}).figures(rows)["epoch"] == 1


def test_a_trial_is_judged_by_an_epoch_that_has_every_figure():
    rows = [
        {"gain": 3.0},
        {"gain": 1.0, "cost": 2.0},
        {"gain": 2.0, "cost": 9.0},
        {"gain": math.nan, "cost": 1.0},
        {"gain": 4.0, "cost": math.nan},
    ]
    assert TWO.figures(rows) == {"gain": 2.0, "cost": 9.0}
    assert TWO.figures(rows[:1]) == {}


LIMITED = Objectives.of({"gain": "max", "cost": "min"}, Bound("cost", 3, "min"), Bound("gain", 2, "max"))


@given(ROWS)
def test_what_is_beyond_a_limit_is_as_if_it_were_not_there(rows):
    within = {name: row for name, row in rows.items() if row["cost"] <= 3 and row["gain"] >= 2}
    assert LIMITED.best(rows) == TWO.best(within)
    assert LIMITED.front(rows) == TWO.front(within)


def test_the_closest_is_least_beyond_the_limits_whatever_their_units():
    limited = Objectives.of({"gain": "max"}, Bound("num_params", 1000, "min"), Bound("latency_ms", 0.5, "min"))
    rows = {
        "far": {"gain": 1.0, "num_params": 900.0, "latency_ms": 1.0},
        "near": {"gain": 0.1, "num_params": 1200.0, "latency_ms": 0.55},
        "other": {"gain": 0.2, "num_params": 1400.0, "latency_ms": 0.1},
    }
    assert limited.best(rows) is None
    assert limited.closest(rows) == "near"


def test_a_limit_itself_is_within_and_a_trial_needs_a_figure_for_each():
    assert Bound("cost", 0.3, "min").excess({"cost": 0.3}) == 0
    assert Bound("cost", 0, "min").excess({"cost": 0.1}) > 0
    assert str(Bound("gain", 0.5, "max")) == "gain at least 0.5"
    one = Objectives.of({"gain": "max"}, Bound("size", 1, "min"))
    assert one.figures([{"gain": 9.0}, {"gain": 1.0, "size": 5.0}]) == {"gain": 1.0, "size": 5.0}
