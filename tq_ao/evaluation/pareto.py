"""Stored bits against quality: our schedules, their baselines, and other ways to store a cache, on the same text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tq_ao.calibration.allocation import Schedule, first_last, knapsack, ranked, shuffled, uniform
from tq_ao.calibration.calibrate import collect, divided
from tq_ao.calibration.gain import compensated
from tq_ao.calibration.repair import repair
from tq_ao.calibration.sensitivity import Metric, Table, sensitivity
from tq_ao.calibration.variants import Choice, choose_variants
from tq_ao.evaluation.baselines import baselines
from tq_ao.evaluation.setup import Setup, provenance
from tq_ao.evaluation.transformers_cache import versions
from tq_ao.measure.evaluator import Evaluator
from tq_ao.measure.metrics import Metrics
from tq_ao.measure.simulate import LayerPlan
from tq_ao.rotation import LayerMaps


@dataclass(frozen=True)
class Options:
    """Settings of `pareto`.

    Attributes:
        budgets: average code bits of the mixed schedules.
        window, sinks: of the cache.
        metric: sensitivity the calibrated schedules are allocated by.
        repair_evaluations: measured swaps per budget; 0 leaves the repaired rows out.
        stride: positions of the calibration text evaluated in repair.
        context: tokens the calibrated maps are to serve, see `calibrate`.
        seed: of label sampling and random baselines.
    """

    budgets: Sequence[float] = (1.75, 2.0, 2.25, 2.5, 3.0, 3.5)
    window: int = 128
    sinks: int = 4
    metric: Metric = "taylor"
    repair_evaluations: int = 0
    stride: int = 2
    context: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Calibrated:
    """Maps and sensitivities of a model, before bits are chosen."""

    choices: list[Choice]
    maps: dict[int, LayerMaps]
    table: Table
    plain_table: Table


def calibrate_once(setup: Setup, options: Options, progress: bool) -> Calibrated:
    """Statistics on the first two thirds of the calibration text, variants and sensitivities on the rest."""
    seen, rest, _ = divided(setup.calibration, setup.recall)
    common = {
        "window": options.window, "sinks": options.sinks, "context": options.context, "seed": options.seed,
        "progress": progress,
    }  # fmt: skip
    statistics = collect(setup.model, seen, sorted(setup.plain), **common)  # type: ignore[arg-type]
    choices = choose_variants(setup.model, rest, setup.plain, statistics, **common)  # type: ignore[arg-type]
    maps = {c.layer: c.maps for c in choices}
    table = sensitivity(setup.model, rest, maps, options.metric, compensate=True, **common)  # type: ignore[arg-type]
    plain_table = sensitivity(setup.model, rest, setup.plain, options.metric, **common)  # type: ignore[arg-type]
    return Calibrated(choices, maps, table, plain_table)


def pareto(
    setup: Setup, options: Options, *, progress: bool = False, report: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Measure every method on the held-out windows.

    Returns:
        {model, text, versions, commit, device, rows: [{method, code_bits, stored_bits, window, sinks, kl, kl_stderr,
        ppl_ratio, ppl_ratio_stderr, top1, schedule}], variants, left_out: {baseline: why}}.
    """
    origin = provenance()
    origin["versions"] |= versions()
    evaluate = Evaluator(setup.model, setup.evaluation, window=options.window, sinks=options.sinks)
    rows: list[dict[str, Any]] = []

    def add(
        method: str, code: float, stored: float, m: Metrics, schedule: Schedule | None = None,
        sinks: int = options.sinks,
    ) -> None:  # fmt: skip
        row = {
            "method": method, "code_bits": round(code, 4), "stored_bits": round(stored, 4), "window": options.window,
            "sinks": sinks, "kl": m.kl, "kl_stderr": m.kl_stderr, "ppl_ratio": m.ppl_ratio,
            "ppl_ratio_stderr": m.ppl_ratio_stderr, "top1": m.top1,
        }  # fmt: skip
        if schedule is not None:
            row["schedule"] = {str(i): list(pair) for i, pair in schedule.items()}
        rows.append(row)
        report(
            f"{method:34s} {code:5.3f} bits  KL {m.kl:.5f} +- {m.kl_stderr:.5f}  ppl {100 * (m.ppl_ratio - 1):+.2f} %"
        )

    def plans(schedule: Schedule, maps: dict[int, LayerMaps]) -> dict[int, LayerPlan]:
        if maps is setup.plain:
            return {i: LayerPlan(*pair, maps[i]) for i, pair in schedule.items()}
        return {i: LayerPlan(*pair, compensated(maps[i], *pair)) for i, pair in schedule.items()}

    def ours(method: str, schedule: Schedule, maps: dict[int, LayerMaps]) -> None:
        stored = setup.shape.average(schedule, stored=True)
        add(method, setup.shape.average(schedule), stored, evaluate(plans(schedule, maps)), schedule)

    for bits in (2, 3, 4):
        ours("uniform, plain", uniform(setup.shape, bits), setup.plain)
    others, left_out = baselines(setup, options.window, options.sinks)
    for other in others:
        measured = evaluate.measure(other.attention)
        add(other.method, other.bits, other.stored_bits, measured, sinks=other.sinks)
    calibrated = calibrate_once(setup, options, progress)
    if len(setup.plain) >= 4:
        by_weight = "25/50/25 by k_proj weight MSE"
        try:
            weights = sensitivity(setup.model, setup.calibration[:1], setup.plain, "weight", bits=(3,))
        except ValueError as error:  # of models with one projection for q, k and v
            left_out[by_weight] = str(error)
        else:
            ours(by_weight, ranked({i: weights[i, "key", 3] for i in setup.plain}), setup.plain)
        ours("25/50/25 at random", shuffled(setup.plain, options.seed), setup.plain)
        ours("first and last layers protected", first_last(setup.shape, 3.0), setup.plain)
    for method, reason in left_out.items():
        report(f"{method:34s} left out: {reason}")
    for bits in (2, 3, 4, 8):  # the last shows what a model in bfloat16 makes of a change of any size
        ours("uniform, calibrated", uniform(setup.shape, bits), calibrated.maps)
    tuning = None
    if options.repair_evaluations:
        _, _, rest = divided(setup.calibration, setup.recall)
        tuning = Evaluator(setup.model, rest, window=options.window, sinks=options.sinks, stride=options.stride)
    for budget in options.budgets:
        ours("schedule, plain", knapsack(calibrated.plain_table, setup.shape, budget), setup.plain)
        schedule = knapsack(calibrated.table, setup.shape, budget)
        ours("schedule, calibrated", schedule, calibrated.maps)
        if tuning is not None:
            fixed = repair(
                schedule,
                lambda s: tuning(plans(s, calibrated.maps)).kl,
                calibrated.table, setup.shape, budget, evaluations=options.repair_evaluations,
            )  # fmt: skip
            ours("schedule, calibrated, repaired", fixed.schedule, calibrated.maps)
    return {
        "model": setup.name, "text": setup.text, **origin, "metric": options.metric, "context": options.context,
        "rows": rows,
        "variants": {str(c.layer): [c.key_variant, c.value_variant] for c in calibrated.choices},
        "left_out": left_out,
    }  # fmt: skip
