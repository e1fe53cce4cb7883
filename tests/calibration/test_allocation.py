"""Knapsack against brute force, budgets, baselines."""

import itertools

import pytest
import torch

from tq_ao.calibration.allocation import Shape, additive_cost, first_last, knapsack, ranked, shuffled, uniform


def random_costs(layers, bits, rng):
    costs = {}
    for i in layers:
        for side in ("key", "value"):
            base = torch.rand((), generator=rng).item()
            for b in bits:
                costs[i, side, b] = base * 4.0**-b * (0.5 + torch.rand((), generator=rng).item())
    return costs


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("budget", [2.0, 2.5, 3.1])
def test_knapsack_equals_brute_force(rng, budget, stored):
    layers, bits = [0, 2, 5], (1, 2, 4)
    shape = Shape({0: (2, 64), 2: (1, 128), 5: (4, 64)})
    costs = random_costs(layers, bits, rng)
    pairs = [(k, v) for k in bits for v in bits] + [(16, 16)]
    fits = [
        dict(zip(layers, choice, strict=True)) for choice in itertools.product(pairs, repeat=3)
        if shape.average(dict(zip(layers, choice, strict=True)), stored=stored) <= budget
    ]  # fmt: skip
    best = min(additive_cost(costs, s) for s in fits)
    found = knapsack(costs, shape, budget, bits=bits, exact=True, stored=stored)
    assert shape.average(found, stored=stored) <= budget
    assert additive_cost(costs, found) == pytest.approx(best, rel=1e-12)


def test_budget_below_the_smallest_schedule(rng):
    costs = random_costs([0, 1], (2, 3), rng)
    with pytest.raises(ValueError, match=r"at least 2\.000 bits"):
        knapsack(costs, Shape.same([0, 1]), 1.5, bits=(2, 3))


def test_stored_bits_count_the_scales():
    shape = Shape({0: (3, 64)})
    assert shape.average({0: (3, 2)}) == 2.5
    assert shape.average({0: (3, 2)}, stored=True) == 2.5 + 16 / 64
    assert shape.average({0: (16, 16)}, stored=True) == 16


def test_baselines_keep_their_budget():
    shape = Shape.same(range(12))
    assert shape.average(uniform(shape, 3)) == 3
    assert shape.average(ranked({i: float(i) for i in range(12)})) == 3
    assert shape.average(shuffled(range(12), 0)) == 3
    assert shuffled(range(12), 0) != shuffled(range(12), 1)
    protected = first_last(shape, 3.0)
    assert shape.average(protected) <= 3
    assert all(protected[i] == (4, 4) for i in (0, 1, 10, 11))


def test_articles_rule_gives_most_bits_to_the_most_sensitive():
    schedule = ranked({0: 0.1, 1: 0.9, 2: 0.5, 3: 0.4})
    assert schedule == {0: (2, 2), 1: (4, 4), 2: (3, 3), 3: (3, 3)}
