"""What each part of the calibration is worth: map variants one side at a time, gains and decoders on schedules."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tq_ao.calibration.allocation import Schedule, knapsack
from tq_ao.calibration.calibrate import collect
from tq_ao.calibration.gain import gain
from tq_ao.calibration.sensitivity import sensitivity
from tq_ao.calibration.transforms import KEY_VARIANTS, VALUE_VARIANTS
from tq_ao.calibration.variants import candidates, choose_variants
from tq_ao.config import EXACT
from tq_ao.evaluation.decoders import refit
from tq_ao.evaluation.setup import Setup, provenance
from tq_ao.measure.evaluator import Evaluator
from tq_ao.measure.simulate import LayerPlan
from tq_ao.rotation import LayerMaps

# (key, value) shares of the way from least squares to unbiased: see calibration.gain.
GAIN_SHARES = (
    (0.0, 0.0),
    (0.0, 0.5),
    (0.0, 1.0),
    (0.25, 0.0),
    (0.25, 0.5),  # the default with error feedback
    (0.5, 0.0),
    (1.0, 0.0),
    (0.5, 1.0),  # the default without
    (0.75, 1.0),
    (1.0, 1.0),
)


def ablation(
    setup: Setup,
    budgets: Sequence[float],
    window: int,
    sinks: int,
    seed: int,
    progress: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure variants, gains and decoders on the held-out windows.

    Returns:
        {model, text, versions, commit, device, window, sinks,
        rows: [{experiment, name, bits, kl, kl_stderr, ppl_ratio}]}.
    """
    origin = provenance()
    evaluate = Evaluator(setup.model, setup.evaluation, window=window, sinks=sinks)
    rows: list[dict[str, Any]] = []

    def add(experiment: str, name: str, bits: float, schedule: Schedule, maps: dict[int, LayerMaps]) -> None:
        m = evaluate({i: LayerPlan(*pair, maps[i]) for i, pair in schedule.items()})
        row = {"experiment": experiment, "name": name, "bits": bits, "kl": m.kl, "kl_stderr": m.kl_stderr}
        rows.append(row | {"ppl_ratio": m.ppl_ratio})
        report(f"{experiment:10s} {name:28s} {bits:5.2f} bits  KL {m.kl:.5f} +- {m.kl_stderr:.5f}")

    cut = max(1, setup.calibration.shape[0] * 2 // 3)
    layers, first, rest = sorted(setup.plain), setup.calibration[:cut], setup.calibration[cut:]
    statistics = collect(setup.model, first, layers, window=window, sinks=sinks, seed=seed, progress=progress)
    built = {i: candidates(setup.plain[i], statistics[i], KEY_VARIANTS, VALUE_VARIANTS) for i in layers}
    for variant in KEY_VARIANTS:
        for b in (2, 3):
            add(
                "keys only",
                variant,
                b,
                dict.fromkeys(layers, (b, EXACT)),
                {i: built[i]["key", variant] for i in layers},
            )
    for variant in VALUE_VARIANTS:
        for b in (1, 2, 3):
            maps = {i: built[i]["value", variant] for i in layers}
            add("values only", variant, b, dict.fromkeys(layers, (EXACT, b)), maps)
    del built
    choices = choose_variants(
        setup.model, rest, setup.plain, statistics, window=window, sinks=sinks, seed=seed, progress=progress
    )
    chosen = {c.layer: c.maps for c in choices}
    for b in (2, 3):
        add("keys only", "chosen per layer", b, dict.fromkeys(layers, (b, EXACT)), chosen)
    for b in (1, 2, 3):
        add("values only", "chosen per layer", b, dict.fromkeys(layers, (EXACT, b)), chosen)
    table = sensitivity(
        setup.model, rest, chosen, "taylor", compensate=True, window=window, sinks=sinks, seed=seed, progress=progress
    )
    for budget in budgets:
        schedule = knapsack(table, setup.shape, budget)
        for shares in GAIN_SHARES:
            maps = {i: _with_shares(chosen[i], *schedule[i], *shares) for i in layers}
            add("gain", f"key {shares[0]}, value {shares[1]}", budget, schedule, maps)
        plans = {i: LayerPlan(*schedule[i], chosen[i]) for i in layers}
        for side in ("value", "key"):
            fitted = refit(setup.model, first, plans, window=window, sinks=sinks, sides=(side,), progress=progress)
            add("decoder", f"fitted, {side}", budget, schedule, fitted)
    return {
        "model": setup.name, "text": setup.text, **origin, "window": window, "sinks": sinks, "rows": rows,
    }  # fmt: skip


def _with_shares(maps: LayerMaps, k_bits: int, v_bits: int, key_share: float, value_share: float) -> LayerMaps:
    """Maps scaled by given shares of the way to unbiased, instead of the defaults."""
    k, v = gain(k_bits, "key", key_share), gain(v_bits, "value", value_share)
    return replace(maps, query=maps.query * k, output=maps.output * v)
