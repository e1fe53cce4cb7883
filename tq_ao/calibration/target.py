"""The cheapest schedule that meets a quality target: bisection over the budget, measuring each candidate."""

from collections.abc import Callable
from dataclasses import dataclass

from tq_ao.calibration.allocation import Schedule


@dataclass(frozen=True)
class Target:
    """Result: the schedule, its budget and measured value, and (budget, value) of every measurement."""

    schedule: Schedule
    budget: float
    value: float
    trials: tuple[tuple[float, float], ...]


def meet(
    target: float,
    schedule_for: Callable[[float], Schedule],
    measure: Callable[[Schedule], float],
    *,
    low: float = 1.0,
    high: float = 4.0,
    step: float = 0.125,
) -> Target:
    """Smallest budget on a grid whose schedule measures at most `target`.

    Args:
        target: largest acceptable loss, e.g. KL in nats, or a perplexity ratio.
        schedule_for: budget in average bits -> schedule, e.g. `allocation.knapsack` with its table.
        measure: loss of a schedule; taken to fall as the budget grows.
        low, high, step: grid of budgets, none above `high`; log2((high - low) / step) measurements.

    Raises:
        ValueError: even `high` misses the target.
    """
    budgets = [low + step * n for n in range(int((high - low) / step + 1e-9) + 1)]
    seen: dict[int, tuple[Schedule, float]] = {}

    def value(n: int) -> float:
        if n not in seen:
            schedule = schedule_for(budgets[n])
            seen[n] = schedule, measure(schedule)
        return seen[n][1]

    first, last = 0, len(budgets) - 1
    if value(last) > target:
        raise ValueError(
            f"expected a target that {high:g} bits can meet, got {target:g}; measured there: {value(last):.4g}; "
            "raise the target or the bits"
        )
    while first < last:
        middle = (first + last) // 2
        first, last = (first, middle) if value(middle) <= target else (middle + 1, last)
    schedule, found = seen[last]
    return Target(schedule, budgets[last], found, tuple((budgets[n], v) for n, (_, v) in sorted(seen.items())))
