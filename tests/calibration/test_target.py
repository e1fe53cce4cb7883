"""The target search finds the smallest budget that meets it, and says when none does."""

import pytest

from tq_ao.calibration.target import meet


def test_smallest_budget_that_meets_the_target():
    calls = []

    def measure(schedule):
        calls.append(schedule)
        return 4.0 ** -schedule[0][0]

    found = meet(4.0**-2.6, lambda budget: {0: (budget, budget)}, measure)
    assert found.budget == 2.625
    assert found.value == pytest.approx(4.0**-2.625)
    assert found.schedule == {0: (2.625, 2.625)}
    assert len(calls) <= 7
    assert found.trials == tuple(sorted(found.trials))


def test_a_target_out_of_reach():
    with pytest.raises(ValueError, match="4 bits can meet"):
        meet(1e-9, lambda budget: {0: (3, 3)}, lambda schedule: 0.5)
