"""Which layer gets how many bits: exact knapsack over per-layer (K bits, V bits), and the baselines.

Costs are additive: cost[layer, side, bits] is what quantising that side of that layer alone does (KL in nats,
or any other sensitivity).  Sizes count code bits per value, or stored bits (codes and fp16 scales).
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd

from tq_ao.codebook import BITS
from tq_ao.config import EXACT

Schedule = dict[int, tuple[int, int]]
Costs = Mapping[tuple[int, str, int], float]  # (layer, "key" | "value", bits) -> cost
SCALE_BITS = 16
_MAX_CELLS = 200_000


@dataclass(frozen=True)
class Shape:
    """Sizes of the quantised layers: layer -> (kv_heads, head_dim)."""

    layers: Mapping[int, tuple[int, int]]

    @classmethod
    def same(cls, layers: Iterable[int], kv_heads: int = 1, head_dim: int = 128) -> "Shape":
        """All layers alike."""
        return cls(dict.fromkeys(layers, (kv_heads, head_dim)))

    def values(self) -> int:
        """K and V values per token."""
        return sum(2 * heads * dim for heads, dim in self.layers.values())

    def size(self, layer: int, k_bits: int, v_bits: int, *, stored: bool) -> int:
        """Bits per token of a layer: codes, and fp16 scales of packed layers if `stored`."""
        heads, dim = self.layers[layer]
        scales = 2 * heads * SCALE_BITS if stored and k_bits != EXACT else 0
        return heads * dim * (k_bits + v_bits) + scales

    def average(self, schedule: Mapping[int, tuple[int, int]], *, stored: bool = False) -> float:
        """Average bits per value of a schedule."""
        return sum(self.size(i, *schedule[i], stored=stored) for i in self.layers) / self.values()


def knapsack(
    costs: Costs,
    shape: Shape,
    average_bits: float,
    *,
    bits: Sequence[int] = (1, 2, 3, 4),
    exact: bool = False,
    stored: bool = False,
) -> Schedule:
    """The schedule of least additive cost whose average bits per value do not exceed a budget.

    Args:
        costs: cost of every (layer, side, bits) on offer.
        shape: sizes of the layers to schedule.
        average_bits: budget, in code bits per value (stored bits if `stored`).
        bits: widths on offer for each side.
        exact: also offer keeping a layer exact (16 bits both sides, cost 0).
        stored: count fp16 scales.

    Raises:
        ValueError: the budget is below the smallest schedule, or a width is unknown.
    """
    if unknown := set(bits) - set(BITS):
        raise ValueError(f"expected bits from {BITS}, got {sorted(unknown)}")
    layers = sorted(shape.layers)
    pairs = [(k, v) for k in bits for v in bits] + ([(EXACT, EXACT)] if exact else [])
    sizes = {i: [shape.size(i, *pair, stored=stored) for pair in pairs] for i in layers}
    budget = average_bits * shape.values() * (1 + 1e-9)
    smallest = sum(min(s) for s in sizes.values())
    if smallest > budget:
        raise ValueError(
            f"expected a budget of at least {smallest / shape.values():.3f} bits per value for widths {tuple(bits)}, "
            f"got {average_bits}"
        )
    unit = gcd(*(s for row in sizes.values() for s in row))
    unit *= max(1, -(-int(budget // unit) // _MAX_CELLS))
    room = int(budget // unit)
    best = [0.0] + [float("inf")] * room  # least cost using exactly so many cells
    choices: list[list[int]] = []
    for layer in layers:
        priced = [
            (
                -(-size // unit),
                0.0 if pair[0] == EXACT else costs[layer, "key", pair[0]] + costs[layer, "value", pair[1]],
                n,
            )
            for n, (pair, size) in enumerate(zip(pairs, sizes[layer], strict=True))
        ]
        new, chosen = [float("inf")] * (room + 1), [-1] * (room + 1)
        for cells, cost, n in priced:
            for used in range(room - cells + 1):
                total = best[used] + cost
                if total < new[used + cells]:
                    new[used + cells], chosen[used + cells] = total, n
        best = new
        choices.append(chosen)
    used = min(range(room + 1), key=best.__getitem__)
    if best[used] == float("inf"):
        raise ValueError(
            f"no schedule of widths {tuple(bits)} fits {average_bits} bits per value on this grid; raise the budget"
        )
    schedule: Schedule = {}
    for layer, chosen in zip(reversed(layers), reversed(choices), strict=True):
        n = chosen[used]
        schedule[layer] = pairs[n]
        used -= -(-sizes[layer][n] // unit)
    return dict(sorted(schedule.items()))


def additive_cost(costs: Costs, schedule: Mapping[int, tuple[int, int]]) -> float:
    """Predicted cost of a schedule; exact layers cost nothing."""
    return sum(costs[i, "key", k] + costs[i, "value", v] for i, (k, v) in schedule.items() if k != EXACT)


def uniform(shape: Shape, bits: int) -> Schedule:
    """The same width everywhere."""
    return dict.fromkeys(sorted(shape.layers), (bits, bits))


def first_last(shape: Shape, average_bits: float, *, protected: int = 2) -> Schedule:
    """The first and last `protected` layers at 4 bits, the rest as wide as the budget allows, early layers first."""
    layers = sorted(shape.layers)
    edge = set(layers[:protected]) | set(layers[-protected:])
    return _fill({i: 4 if i in edge else 1 for i in layers}, [i for i in layers if i not in edge], shape, average_bits)


def _fill(widths: dict[int, int], order: list[int], shape: Shape, average_bits: float) -> Schedule:
    """Raise the width of the layers in `order` in turn, one bit per round, while the budget holds."""
    for width in (2, 3, 4):
        for i in order:
            trial = widths | {i: width}
            if shape.average({j: (b, b) for j, b in trial.items()}) <= average_bits + 1e-9:
                widths = trial
    return {i: (b, b) for i, b in widths.items()}


def ranked(scores: Mapping[int, float], average_bits: float = 3.0) -> Schedule:
    """The article's rule: most sensitive quarter of the layers at one bit more than the average, least at one less.

    Args:
        scores: layer -> sensitivity.
        average_bits: width of the middle half.
    """
    order = sorted(scores, key=lambda i: (-scores[i], i))
    quarter, middle = len(order) // 4, round(average_bits)
    top, bottom = set(order[:quarter]), set(order[len(order) - quarter :] if quarter else ())
    widths = {i: middle + (i in top) - (i in bottom) for i in sorted(scores)}
    return {i: (b, b) for i, b in widths.items()}


def shuffled(layers: Iterable[int], seed: int, average_bits: float = 3.0) -> Schedule:
    """The article's shares on layers drawn at random."""
    generator = random.Random(seed)
    return ranked({i: generator.random() for i in sorted(layers)}, average_bits)
