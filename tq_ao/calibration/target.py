"""The cheapest schedule that stays within limits of quality: bisection over the budget, measuring each candidate."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tq_ao.calibration.allocation import Schedule
from tq_ao.measure.metrics import Metrics


@dataclass(frozen=True)
class Loss:
    """A loss that can be limited: how it is read from Metrics, and how a value of it is written."""

    of: Callable[[Metrics], float]
    form: str

    def text(self, value: float) -> str:
        """A value with the loss's name and unit."""
        return self.form.format(value)


# By the name of the setting that limits it: a key of recipes, and with dashes a flag of convert.py.
LOSSES = {
    "max_kl": Loss(lambda metrics: metrics.kl, "KL {:.4g}"),  # nats
    "max_ppl": Loss(lambda metrics: 100 * (metrics.ppl_ratio - 1), "perplexity {:+.4g} %"),
}


def losses(metrics: Metrics) -> dict[str, float]:
    """Every loss of a measurement, by the name of its limit."""
    return {name: loss.of(metrics) for name, loss in LOSSES.items()}


def missed(limits: Mapping[str, float], values: Mapping[str, float]) -> list[str]:
    """Names of the limits that the values exceed, or do not show to hold (NaN)."""
    return [name for name, limit in limits.items() if not values[name] <= limit]


def describe(limits: Mapping[str, float], values: Mapping[str, float] | None = None) -> str:
    """The limits in words, or the values of what they limit."""
    shown = limits if values is None else values
    return " and ".join(LOSSES[name].text(shown[name]) for name in limits)


def amount(budget: float, unit: str) -> str:
    """A budget in words; of bits it is an average."""
    if unit != "bits":
        return f"{budget:g} {unit}"
    return f"{budget:g} {'bit' if budget == 1 else 'bits'} on average"


@dataclass(frozen=True)
class Target:
    """Result: the schedule, its budget and measured values, and (budget, values) of every measurement."""

    schedule: Schedule
    budget: float
    values: Mapping[str, float]
    trials: tuple[tuple[float, Mapping[str, float]], ...]


def meet(
    limits: Mapping[str, float],
    schedule_for: Callable[[float], Schedule],
    measure: Callable[[Schedule], Mapping[str, float]],
    *,
    low: float = 1.0,
    high: float = 4.0,
    step: float = 0.125,
    unit: str = "bits",
) -> Target:
    """Smallest budget on a grid whose schedule measures within all limits.

    Args:
        limits: largest acceptable losses, by their names in LOSSES.
        schedule_for: budget -> schedule, e.g. `allocation.knapsack` with its table.
        measure: losses of a schedule by the same names; taken to fall as the budget grows. Where noise makes one rise,
            what is found is within the limits, but fewer bits may be, too.
        low, high, step: grid of budgets from `low`, and `high`; log2((high - low) / step) measurements.
        unit: of budgets, in words.

    Raises:
        ValueError: even `high` misses a limit.
    """
    budgets = [low + step * n for n in range(math.ceil((high - low) / step - 1e-9))] + [high]
    seen: dict[int, tuple[Schedule, Mapping[str, float]]] = {}

    def values(n: int) -> Mapping[str, float]:
        if n not in seen:
            schedule = schedule_for(budgets[n])
            seen[n] = schedule, measure(schedule)
        return seen[n][1]

    first, last = 0, len(budgets) - 1
    if missed(limits, values(last)):
        raise ValueError(
            f"expected a target that a schedule of at most {amount(high, unit)} can meet, got {describe(limits)}; "
            f"measured there: {describe(limits, values(last))}; raise the target or the {unit}"
        )
    while first < last:
        middle = (first + last) // 2
        first, last = (middle + 1, last) if missed(limits, values(middle)) else (first, middle)
    schedule, found = seen[last]
    return Target(schedule, budgets[last], found, tuple((budgets[n], v) for n, (_, v) in sorted(seen.items())))
