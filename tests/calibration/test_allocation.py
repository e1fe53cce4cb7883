"""Knapsack against brute force, budgets, baselines."""

import itertools
import re
from dataclasses import replace

import pytest
import torch

from tq_ao.calibration.allocation import (
    MIB,
    Memory,
    Shape,
    additive_cost,
    first_last,
    knapsack,
    offered,
    ranked,
    shuffled,
    smallest,
    uniform,
)


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


def random_memory(layers, rng):
    """Layers of any shape; sizes in odd bytes, an exact layer now smaller and now larger than a packed one."""

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=rng))

    shape = {i: (draw(1, 5), 32 * draw(1, 5)) for i in layers}
    packed = 32 * draw(1, 20)
    values = {i: 2 * heads * dim for i, (heads, dim) in shape.items()}
    return Memory(
        shape, 0.0, packed=packed, around={i: draw(1, 30_000) for i in layers},
        maps={i: draw(1, 60_000) for i in layers}, exact={i: draw(1, 3 * packed) * values[i] for i in layers},
        beside=draw(0, 10_000),
    )  # fmt: skip


@pytest.mark.parametrize("problem", range(8))
def test_a_schedule_in_bytes_equals_brute_force(problem, seed):
    """To the byte, at every budget that buys something and one byte below."""
    rng, layers, bits = torch.Generator().manual_seed(seed + problem), [0, 2, 5], (1, 2, 4, 8)
    memory, costs = random_memory(layers, rng), random_costs(layers, bits, rng)
    pairs = offered(bits, exact=True)

    def needed(schedule):  # by hand: codes and fp16 scales of the tiles, what is around them, maps
        total = memory.beside
        for i, (k, v) in schedule.items():
            heads, dim = memory.layers[i]
            codes = memory.packed * heads * (dim * k // 8 + 2 + dim * v // 8 + 2)
            total += memory.exact[i] if k == 16 else codes + memory.around[i] + memory.maps[i]
        return total

    every = [dict(zip(layers, choice, strict=True)) for choice in itertools.product(pairs, repeat=3)]
    known = sorted((needed(schedule), additive_cost(costs, schedule)) for schedule in every)
    assert smallest(memory, pairs) == known[0][0] / MIB
    before = None  # the least cost for less
    for room, cost in known:
        if before is not None and cost >= before:
            continue
        for most, best in ((room - 1, before), (room, cost)):
            if best is not None:
                found = knapsack(costs, memory, most / MIB, bits=bits, exact=True)
                assert needed(found) <= most and memory.needed(memory.total(found)) == needed(found) / MIB
                assert additive_cost(costs, found) == pytest.approx(best, rel=1e-12, abs=1e-300)
        before = cost


def test_maps_can_make_a_packed_layer_larger_than_an_exact_one(rng):
    """600 tokens: one head of 256 has 1 MiB of maps and 0.6 MiB of exact K and V; eight of 64 have more K and V."""
    layers = {0: (1, 256), 1: (8, 64)}
    values = {i: 2 * heads * dim for i, (heads, dim) in layers.items()}
    memory = Memory(
        layers, 0.0, packed=448, around={i: 2 * 196 * n for i, n in values.items()},
        maps={i: 16 * heads * dim**2 for i, (heads, dim) in layers.items()},
        exact={i: 2 * 600 * n for i, n in values.items()},
    )  # fmt: skip
    costs = {
        (i, side, b): (1 + i) * 4.0**-b * (1 + torch.rand((), generator=rng).item() / 2)
        for i in layers for side in ("key", "value") for b in (1, 2, 3, 4)
    }  # fmt: skip
    room = (memory.exact[0] + memory.size(1, 4, 4)) / MIB
    assert knapsack(costs, memory, room, exact=True) == {0: (16, 16), 1: (4, 4)}
    blind = knapsack(costs, replace(memory, maps=dict.fromkeys(layers, 0)), room, exact=True)
    assert blind == {0: (4, 4), 1: (16, 16)} and memory.needed(memory.total(blind)) > room


def test_the_budget_an_error_asks_for_is_enough(rng):
    layers = [0, 1, 2]
    memory, costs = random_memory(layers, rng), random_costs(layers, (2, 3), rng)
    least = smallest(memory, offered((2, 3), exact=True))
    with pytest.raises(ValueError, match=r"at least [\d.]+ MiB for widths \(2, 3\), got ") as caught:
        knapsack(costs, memory, least - 1 / MIB, bits=(2, 3), exact=True)
    asked = float(re.search(r"at least ([\d.]+)", str(caught.value))[1])
    assert memory.total(knapsack(costs, memory, asked, bits=(2, 3), exact=True)) <= memory.room(asked)


def test_budget_below_the_smallest_schedule(rng):
    costs = random_costs([0, 1], (2, 3), rng)
    with pytest.raises(ValueError, match=r"at least 2\.000 bits"):
        knapsack(costs, Shape.same([0, 1]), 1.5, bits=(2, 3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_costs_that_are_no_numbers_are_avoided(bad, rng):
    layers = [0, 1, 2]
    shape, costs = Shape.same(layers), random_costs(layers, (1, 2, 3), rng)
    assert knapsack({**costs, (1, "key", 3): bad}, shape, 3.0, bits=(1, 2, 3))[1] == (2, 3)
    with pytest.raises(ValueError, match="expected costs of widths .* that are finite"):
        knapsack({**costs, **{(1, "key", b): bad for b in (1, 2, 3)}}, shape, 3.0, bits=(1, 2, 3))


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


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_articles_rule_has_no_quarter_of_fewer_than_four_layers(layers):
    assert set(ranked({i: float(i) for i in range(layers)}).values()) == {(3, 3)}


def test_the_smallest_budget_for_a_total_has_room_for_it():
    shape = Shape.same(range(7), 7, 32)
    assert all(shape.room(shape.needed(total)) == total for total in range(3000))
