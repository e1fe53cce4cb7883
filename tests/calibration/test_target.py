"""The target search finds the smallest budget that meets every limit, and says when none does."""

import math
from types import SimpleNamespace

import pytest

from tq_ao.calibration.target import LOSSES, amount, describe, losses, meet, missed


def flat(budget):
    return {0: (budget, budget)}


def test_smallest_budget_that_meets_the_target():
    calls = []

    def measure(schedule):
        calls.append(schedule)
        return {"max_kl": 4.0 ** -schedule[0][0]}

    found = meet({"max_kl": 4.0**-2.6}, flat, measure)
    assert found.budget == 2.625
    assert found.values == {"max_kl": pytest.approx(4.0**-2.625)}
    assert found.schedule == {0: (2.625, 2.625)}
    assert len(calls) <= 7
    assert [budget for budget, _ in found.trials] == sorted(schedule[0][0] for schedule in calls)


@pytest.mark.parametrize(
    ("limits", "budget"),
    [
        ({"max_kl": 4.0**-2}, 2.0),
        ({"max_ppl": 2.0**-3}, 3.0),
        ({"max_kl": 4.0**-2, "max_ppl": 2.0**-3}, 3.0),
        ({"max_kl": 4.0**-3.5, "max_ppl": 2.0**-3}, 3.5),
    ],
)
def test_all_limits_hold(limits, budget):
    found = meet(limits, flat, lambda schedule: {"max_kl": 4.0 ** -schedule[0][0], "max_ppl": 2.0 ** -schedule[0][0]})
    assert found.budget == budget and not missed(limits, found.values)


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"max_kl": 1e-9}, r"got KL 1e-09; measured there: KL 0\.5;"),
        ({"max_ppl": 1.0}, r"got perplexity \+1 %; measured there: perplexity \+3 %;"),
        (
            {"max_kl": 1, "max_ppl": 1},
            r"KL 1 and perplexity \+1 %; measured there: KL 0\.5 and perplexity \+3 %; raise",
        ),
    ],
)
def test_a_target_out_of_reach(limits, says):
    said = f"expected a target that a schedule of at most 4 bits on average can meet, .*{says}"
    with pytest.raises(ValueError, match=said):
        meet(limits, flat, lambda schedule: {"max_kl": 0.5, "max_ppl": 3.0})


@pytest.mark.parametrize(("low", "high", "step"), [(1, 2.3, 0.125), (1, 2.3, 0.1), (1, 4, 0.125), (2.5, 2.5, 0.125)])
def test_the_grid_ends_at_what_it_may_take(low, high, step):
    def measure(schedule):
        return {"max_kl": high - schedule[0][0] + 1}

    found = meet({"max_kl": 1.0}, flat, measure, low=low, high=high, step=step)
    assert found.budget == high and all(low <= budget <= high for budget, _ in found.trials)


def test_budgets_in_words():
    words = [amount(1.0, "bits"), amount(1.125, "bits"), amount(4, "bits"), amount(1.0, "MiB")]
    assert words == ["1 bit on average", "1.125 bits on average", "4 bits on average", "1 MiB"]


def test_losses_are_read_from_metrics():
    """Perplexity in percent; better than the exact cache is within every limit, not a number within none."""
    values = losses(SimpleNamespace(kl=0.02, ppl_ratio=0.995))
    assert values == {"max_kl": 0.02, "max_ppl": pytest.approx(-0.5)} and values.keys() == LOSSES.keys()
    limits = {"max_kl": 0.01, "max_ppl": 0.1}
    assert missed(limits, values) == ["max_kl"]
    assert missed(limits, dict.fromkeys(limits, math.nan)) == list(limits)
    assert describe(limits, values) == "KL 0.02 and perplexity -0.5 %"
