"""Measured improvement of a joint schedule: single-layer costs do not add up, so check and swap.

A move takes bits from one (layer, side) and gives them to another within the budget.  The additive model
proposes moves; a measurement of the whole schedule decides.  What each measurement teaches is fed back: the
cost of both places is rescaled by how far the prediction was off, so a model that was wrong about a layer
stops proposing it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tq_ao.calibration.allocation import Costs, Schedule, Shape, additive_cost
from tq_ao.config import EXACT

SIDES = ("key", "value")


@dataclass(frozen=True)
class Repair:
    """Result: the schedule, its measured value, the starting value, and every measurement made."""

    schedule: Schedule
    value: float
    start: float
    trials: tuple[tuple[str, float, bool], ...]


def repair(
    schedule: Schedule,
    evaluate: Callable[[Schedule], float],
    costs: Costs,
    shape: Shape,
    budget: float,
    *,
    evaluations: int,
    bits: Sequence[int] = (1, 2, 3, 4),
    start: float | None = None,
    report: Callable[[str, float, bool], None] | None = None,
) -> Repair:
    """Local search by measured swaps until `evaluations` measurements are spent or no move is left.

    Args:
        schedule: where to start, within the budget.
        evaluate: measured loss of a schedule (KL on calibration text, the same text every time).
        costs: additive costs of every (layer, side, bits).
        shape, budget: as in `allocation.knapsack`.
        evaluations: how often `evaluate` may be called (the starting point included unless `start` is given).
        start: measured loss of `schedule`, if known.
        report: called with (move, value, accepted) after each measurement.

    Returns:
        Repair; its schedule is never worse than the start on `evaluate`.
    """
    trust = {(i, side): 1.0 for i in shape.layers for side in SIDES}
    if start is None:
        if evaluations < 1:
            raise ValueError("expected at least one evaluation, or the measured `start`")
        start, evaluations = evaluate(schedule), evaluations - 1
    best, value, tried = dict(schedule), start, {_key(schedule)}
    scale = start / max(additive_cost(costs, schedule), 1e-30)  # measured per predicted unit
    trials: list[tuple[str, float, bool]] = []
    for _ in range(evaluations):
        proposal = _propose(best, costs, shape, budget, tuple(bits), trust, tried)
        if proposal is None:
            break
        move, candidate, predicted, places = proposal
        tried.add(_key(candidate))
        measured = evaluate(candidate)
        accepted = measured < value
        trials.append((move, measured, accepted))
        if report is not None:
            report(move, measured, accepted)
        surprise = (measured - value) / max(start, 1e-30) - predicted * scale / max(start, 1e-30)
        up, down = places
        trust[down] *= min(2.0, max(0.5, 1 + 10 * surprise))
        trust[up] *= min(2.0, max(0.5, 1 - 10 * surprise))
        if accepted:
            best, value = candidate, measured
    return Repair(best, value, start, tuple(trials))


def _key(schedule: Schedule) -> tuple[tuple[int, tuple[int, int]], ...]:
    return tuple(sorted(schedule.items()))


def _moved(schedule: Schedule, place: tuple[int, str], width: int) -> Schedule:
    i, side = place
    k, v = schedule[i]
    return schedule | {i: (width, v) if side == "key" else (k, width)}


def _steps(schedule: Schedule, costs: Costs, bits: tuple[int, ...], trust: dict[tuple[int, str], float]):  # type: ignore[no-untyped-def]
    """(place, new width, predicted change of cost) one width up or down."""
    for place in trust:
        i, side = place
        width = schedule[i][SIDES.index(side)]
        if width == EXACT:
            continue
        at = bits.index(width)
        for new in bits[max(0, at - 1) : at + 2]:
            if new != width:
                yield place, new, (costs[i, side, new] - costs[i, side, width]) * trust[place], new > width


def _propose(schedule, costs, shape, budget, bits, trust, tried):  # type: ignore[no-untyped-def]
    """The untried exchange within the budget with the best predicted change, or None."""
    steps = list(_steps(schedule, costs, bits, trust))
    ups, downs = [s for s in steps if s[3]], [s for s in steps if not s[3]]
    best, room = None, shape.room(budget)
    for up, up_width, gain, _ in ups:
        for down, down_width, loss, _ in downs:
            if up == down or (best is not None and gain + loss >= best[2]):
                continue
            candidate = _moved(_moved(schedule, up, up_width), down, down_width)
            if _key(candidate) in tried or shape.total(candidate) > room:
                continue
            move = f"{up[0]}.{up[1]} -> {up_width}, {down[0]}.{down[1]} -> {down_width}"
            best = (move, candidate, gain + loss, (up, down))
    return best
