"""Which layer gets how many bits: exact knapsack over per-layer (K bits, V bits), and the baselines.

Costs are additive: cost[layer, side, bits] is what quantising that side of that layer alone does (KL in nats,
or any other sensitivity).  Sizes count code bits per value, stored bits (codes and fp16 scales), or all the bytes of a
cache as they lie in memory.
"""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from tq_ao.codebook import BITS
from tq_ao.config import EXACT

Schedule = dict[int, tuple[int, int]]
Costs = Mapping[tuple[int, str, int], float]  # (layer, "key" | "value", bits) -> cost
SCALE_BITS = 16
MIB = 2**20


@dataclass(frozen=True)
class Shape:
    """Sizes of the quantised layers: layer -> (kv_heads, head_dim).  Budgets are average bits per value."""

    layers: Mapping[int, tuple[int, int]]
    unit: ClassVar[str] = "bits"

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

    def total(self, schedule: Mapping[int, tuple[int, int]], *, stored: bool = False) -> int:
        """Size of a schedule: the sum over its layers."""
        return sum(self.size(i, *schedule[i], stored=stored) for i in self.layers)

    def average(self, schedule: Mapping[int, tuple[int, int]], *, stored: bool = False) -> float:
        """Average bits per value of a schedule."""
        return sum(Shape.size(self, i, *schedule[i], stored=stored) for i in self.layers) / self.values()

    def room(self, budget: float) -> int:
        """The largest `total` within a budget."""
        return int(budget * self.values() * (1 + 1e-9))

    def needed(self, total: int) -> float:
        """The smallest budget with room for a `total`."""
        return total / self.values()


@dataclass(frozen=True)
class Memory(Shape):
    """The same layers in a static cache for one text, as it lies in memory: sizes in bytes, budgets in MiB.

    Attributes:
        mib: the budget, for the whole cache.
        packed: tokens that packed layers hold in tiles, as codes and fp16 scales.
        around: layer -> bytes of its exact tokens and counters, if it is packed.
        maps: layer -> bytes of its maps, shifts and feedback, and of what kernels make of them, if it is packed.
        exact: layer -> bytes if it is kept exact.
        beside: bytes of the layers that are not scheduled.
    """

    mib: float
    packed: int
    around: Mapping[int, int]
    maps: Mapping[int, int]
    exact: Mapping[int, int]
    beside: int = 0
    unit: ClassVar[str] = "MiB"

    def size(self, layer: int, k_bits: int, v_bits: int, *, stored: bool = True) -> int:
        """Bytes of a layer; always as stored."""
        if k_bits == EXACT:
            return self.exact[layer]
        per_token = super().size(layer, k_bits, v_bits, stored=True) // 8  # whole bytes: head_dim is a multiple of 32
        return self.packed * per_token + self.around[layer] + self.maps[layer]

    def room(self, budget: float) -> int:
        """The largest `total` within a budget."""
        return int(budget * MIB) - self.beside

    def needed(self, total: int) -> float:
        """The smallest budget with room for a `total`."""
        return (total + self.beside) / MIB


def offered(bits: Sequence[int], exact: bool) -> list[tuple[int, int]]:
    """All (K bits, V bits) of the given widths, and both exact if `exact`.

    Raises:
        ValueError: an unknown width.
    """
    if unknown := set(bits) - set(BITS):
        raise ValueError(f"expected bits from {BITS}, got {sorted(unknown)}")
    return [(k, v) for k in bits for v in bits] + ([(EXACT, EXACT)] if exact else [])


def smallest(shape: Shape, pairs: Sequence[tuple[int, int]]) -> float:
    """The smallest budget that some schedule of these pairs fits."""
    return shape.needed(sum(min(shape.size(i, *pair, stored=False) for pair in pairs) for i in shape.layers))


def rounded_up(budget: float) -> str:
    """A budget with three decimals that is never less."""
    return f"{math.ceil(1000 * budget - 1e-6) / 1000:.3f}"


def knapsack(
    costs: Costs,
    shape: Shape,
    budget: float,
    *,
    bits: Sequence[int] = (1, 2, 3, 4),
    exact: bool = False,
    stored: bool = False,
) -> Schedule:
    """The schedule of least additive cost within a budget.

    Layer by layer it keeps every sum of sizes that no smaller one undercuts in cost: exact for sizes of any kind, and
    with real costs a few hundred sums.

    Args:
        costs: cost of every (layer, side, bits) on offer.
        shape: sizes of the layers to schedule.
        budget: average code bits per value (stored bits if `stored`), or what else `shape` counts.
        bits: widths on offer for each side.
        exact: also offer keeping a layer exact (16 bits both sides, cost 0).
        stored: count fp16 scales (`Memory` always does).

    Raises:
        ValueError: the budget is below the smallest schedule, a width is unknown, or every schedule has a cost that is
            not a finite number.
    """
    pairs, layers = offered(bits, exact), sorted(shape.layers)
    sizes = {i: [shape.size(i, *pair, stored=stored) for pair in pairs] for i in layers}
    least = sum(map(min, sizes.values()))
    room = shape.room(budget) - least  # for what goes beyond the smallest of every layer
    if room < 0:
        needed = rounded_up(shape.needed(least))
        raise ValueError(f"expected a budget of at least {needed} {shape.unit} for widths {tuple(bits)}, got {budget}")
    front: list[_Sum] = [(0, 0.0, 0, 0)]
    fronts = []
    for i in layers:
        priced = [0.0 if k == EXACT else costs[i, "key", k] + costs[i, "value", v] for k, v in pairs]
        priced = [math.inf if math.isnan(cost) else cost for cost in priced]
        extra = [size - min(sizes[i]) for size in sizes[i]]
        front = _undercut(
            (size + extra[n], cost + priced[n], n, m)
            for n in range(len(pairs)) for m, (size, cost, _, _) in enumerate(front) if size + extra[n] <= room
        )  # fmt: skip
        fronts.append(front)
    if math.isinf(front[-1][1]):
        raise ValueError(f"expected costs of widths {tuple(bits)} that are finite, got none for a whole schedule")
    schedule: Schedule = {}
    at = -1  # the last is the cheapest
    for i, front in zip(reversed(layers), reversed(fronts), strict=True):
        _, _, n, at = front[at]
        schedule[i] = pairs[n]
    return dict(sorted(schedule.items()))


_Sum = tuple[int, float, int, int]  # size, cost, index of the last layer's pair, index of the sum it was added to


def _undercut(sums: Iterable[_Sum]) -> list[_Sum]:
    """Those that cost less than every smaller one, in ascending order of size."""
    kept: list[_Sum] = []
    for candidate in sorted(sums):
        if not kept or candidate[1] < kept[-1][1]:
            kept.append(candidate)
    return kept


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
