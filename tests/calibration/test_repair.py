"""Measured swaps find what the additive model missed, never exceed the budget and never end worse."""

import torch

from tq_ao.calibration.allocation import Memory, Shape, knapsack
from tq_ao.calibration.repair import repair


def setup_costs(rng, layers=6):
    truth, guess = {}, {}
    for i in range(layers):
        for side in ("key", "value"):
            base, error = torch.rand(2, generator=rng).tolist()
            for b in (1, 2, 3, 4):
                truth[i, side, b] = base * 4.0**-b
                guess[i, side, b] = base * 4.0**-b * (0.2 + 4 * error)
    return truth, guess


def measure(truth, schedule):
    """Not additive: K and V errors of a layer multiply."""
    return sum(
        truth[i, "key", k] + truth[i, "value", v] + 3 * truth[i, "key", k] * truth[i, "value", v]
        for i, (k, v) in schedule.items()
    )


def test_repair_improves_a_wrong_model(rng):
    truth, guess = setup_costs(rng)
    shape = Shape.same(range(6))
    start = knapsack(guess, shape, 2.5)
    calls = []

    def evaluate(schedule):
        calls.append(schedule)
        return measure(truth, schedule)

    fixed = repair(start, evaluate, guess, shape, 2.5, evaluations=80)
    best = measure(truth, knapsack(truth, shape, 2.5))
    assert len(calls) <= 80
    assert fixed.value == measure(truth, fixed.schedule)
    assert fixed.start == measure(truth, start)
    assert fixed.value <= fixed.start
    assert fixed.value - best <= 0.7 * (fixed.start - best) + 1e-12
    assert all(shape.average(s) <= 2.5 + 1e-9 for s in calls)


def test_repair_keeps_a_budget_in_bytes(rng):
    """Layers with large maps and with small ones, so that equal bits are not equal bytes; exact ones stay so."""
    truth, guess = setup_costs(rng)
    layers, measured = range(6), []
    truth |= {(i, side, 16): 0.0 for i in layers for side in ("key", "value")}
    heads = {i: 1 + i % 3 for i in layers}
    memory = Memory(
        {i: (heads[i], 64) for i in layers}, 0.0, packed=1000, around=dict.fromkeys(layers, 5001),
        maps={i: 16_389 * heads[i] for i in layers}, exact={i: 40_000 if i == 3 else 10**9 for i in layers},
    )  # fmt: skip
    budget = memory.needed(memory.total(dict.fromkeys(layers, (2, 3))))
    start = knapsack(guess, memory, budget, exact=True)

    def evaluate(schedule):
        measured.append(schedule)
        return measure(truth, schedule)

    fixed = repair(start, evaluate, guess, memory, budget, evaluations=60)
    assert fixed.value <= fixed.start and len(measured) > 10
    assert all(memory.total(s) <= memory.room(budget) and s[3] == (16, 16) for s in measured)
    blind = Shape(memory.layers)
    loose = repair(start, evaluate, guess, blind, blind.average(start) + 0.5, evaluations=60)
    assert any(memory.total(s) > memory.room(budget) for s in measured) and loose.value <= loose.start


def test_repair_stops_when_evaluations_are_spent(rng):
    truth, guess = setup_costs(rng)
    shape = Shape.same(range(6))
    start = knapsack(guess, shape, 2.0)
    fixed = repair(start, lambda s: measure(truth, s), guess, shape, 2.0, evaluations=3, start=measure(truth, start))
    assert len(fixed.trials) == 3


def test_repair_swaps_between_the_layers_behind_an_exact_one(rng):
    truth, guess = setup_costs(rng, layers=3)
    truth |= {(0, side, 16): 0.0 for side in ("key", "value")}
    shape, start = Shape.same(range(3)), {0: (16, 16), 1: (2, 2), 2: (2, 2)}
    fixed = repair(start, lambda s: measure(truth, s), guess, shape, shape.average(start), evaluations=4)
    assert len(fixed.trials) == 3 and fixed.schedule[0] == (16, 16)
