"""How far each layer may go, from a scan of what that costs."""

import pytest

from heliostat.compression.prune.sensitivity import most, spread

HARMS = {"robust": [(0.5, 0.01), (0.9, 0.02)], "delicate": [(0.5, 0.5), (0.9, 2.0)]}
SIZES = {"robust": 100, "delicate": 300}


def _total(sparsities):
    return sum(SIZES[layer] * sparsity for layer, sparsity in sparsities.items()) / sum(SIZES.values())


@pytest.mark.parametrize("total", [0.1, 0.3, 0.6, 0.85])
def test_the_layers_make_the_total_and_the_delicate_one_gives_less(total):
    found = spread(HARMS, SIZES, total)
    assert _total(found) == pytest.approx(total, abs=1e-4)
    assert found["delicate"] < found["robust"]


def test_all_layers_cost_alike_until_one_is_at_the_highest_that_was_tried():
    found = spread(HARMS, SIZES, 0.01)
    assert found["robust"] / 0.5 * 0.01 == pytest.approx(found["delicate"] / 0.5 * 0.5, rel=1e-3)
    assert spread(HARMS, SIZES, 0.5)["robust"] == pytest.approx(0.9)
    assert most(HARMS, SIZES) == pytest.approx(0.9)


def test_a_layer_that_got_better_by_chance_costs_nothing_and_more_never_costs_less():
    harms = {"lucky": [(0.5, -0.2), (0.9, 0.1)], "bumpy": [(0.5, 0.3), (0.9, 0.1)]}
    found = spread(harms, {"lucky": 100, "bumpy": 100}, 0.3)
    assert found["lucky"] > 0.5
    assert found["bumpy"] < 0.1
