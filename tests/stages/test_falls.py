"""Which falls are large, and what is said of them."""

import math

import pytest

from heliostat.stages.falls import in_words, large_falls

MODES = {"val_loss": "min", "val_accuracy": "max", "val_error": "min", "test_accuracy": "max"}


def fell(before, now, modes=MODES):
    return [name for name, *_ in large_falls(now, before, modes)]


def within(figure, width, metric="val_accuracy"):
    return {metric: figure, f"{metric}_low": figure - width, f"{metric}_high": figure + width}


def test_a_metric_that_falls_beyond_both_intervals_has_fallen():
    assert fell(within(0.98, 0.02), within(0.44, 0.06)) == ["val_accuracy"]


def test_a_fall_within_the_intervals_or_of_a_point_is_none():
    assert fell(within(0.90, 0.06), within(0.82, 0.06)) == []
    assert fell(within(0.980, 0.001), within(0.970, 0.001)) == []


def test_a_metric_that_got_better_has_not_fallen():
    assert fell(within(0.5, 0.01), within(0.9, 0.01)) == []
    assert fell(within(9.0, 0.01, "val_error"), within(2.0, 0.01, "val_error")) == []


def test_a_metric_that_is_better_low_falls_by_rising():
    assert fell(within(2.0, 0.1, "val_error"), within(9.0, 0.1, "val_error")) == ["val_error"]


def test_without_intervals_a_metric_has_to_fall_by_a_tenth():
    assert fell({"val_accuracy": 0.9}, {"val_accuracy": 0.85}) == []
    assert fell({"val_accuracy": 0.9}, {"val_accuracy": 0.7}) == ["val_accuracy"]


def test_a_loss_that_doubles_beside_a_metric_that_stays_is_no_fall_and_alone_it_is():
    before, now = {"val_loss": 0.1, "val_accuracy": 0.9}, {"val_loss": 0.22, "val_accuracy": 0.9}
    assert fell(before, now) == []
    assert fell(before, now, {"val_loss": "min"}) == ["val_loss"]
    assert fell(before, {"val_loss": 5.0, "val_accuracy": 0.9}) == ["val_loss"]


def test_the_test_split_warns_of_nothing_and_what_is_no_number_has_fallen():
    assert fell({"test_accuracy": 0.9}, {"test_accuracy": 0.1}) == []
    assert fell({"val_loss": 0.1}, {"val_loss": math.nan}) == ["val_loss"]


def test_the_warning_names_the_figures_and_the_layers_to_blame():
    errors = [{"layer": f"/layer{n}", "sqnr_db": 5.0 + n} for n in range(5)]
    text = in_words([("val_accuracy", 0.98, 0.44)], source="train", errors=errors, advice="; do this")
    assert text.startswith("a large fall from train: val_accuracy 0.98 -> 0.44; ")
    assert "/layer0 (5 dB), /layer1 (6 dB), /layer2 (7 dB) gives" in text
    assert text.endswith("; do this")


@pytest.mark.parametrize("figure", [0.0, 1e-9])
def test_a_loss_of_nothing_does_not_fall_by_rounding(figure):
    assert fell({"val_loss": figure}, {"val_loss": figure + 1e-6}, {"val_loss": "min"}) == []
