"""The whole calibration: statistics, maps per layer, sensitivities, bits per layer, measured repair."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tq_ao import __version__
from tq_ao.calibration.allocation import Memory, Schedule, Shape, additive_cost, knapsack, offered, smallest
from tq_ao.calibration.gain import compensated
from tq_ao.calibration.journal import Journal
from tq_ao.calibration.repair import Repair, repair
from tq_ao.calibration.sensitivity import Metric, Table, bar, device_of, sensitivity
from tq_ao.calibration.statistics import LayerStatistics, accumulate, readout_gram
from tq_ao.calibration.target import amount, describe, losses, meet
from tq_ao.calibration.transforms import KEY_CHOICES, VALUE_CHOICES
from tq_ao.calibration.variants import Choice, choose_variants
from tq_ao.config import EXACT
from tq_ao.footprint import maps_bytes
from tq_ao.measure.capture import trace, window_start
from tq_ao.measure.evaluator import Evaluator
from tq_ao.measure.metrics import SKIP
from tq_ao.measure.simulate import LayerPlan
from tq_ao.rotation import LayerMaps


@dataclass(frozen=True)
class CalibrationResult:
    """What `calibrate` decided, and why.

    Attributes:
        schedule: layer -> (k_bits, v_bits) for every quantised layer; (16, 16) is kept exact.
        maps: packed layer -> calibrated LayerMaps (CPU) for exactly these bit widths, or None for plain TurboQuant
            rotations.
        table: (layer, "key" | "value", bits) -> estimated KL in nats.
        variants: layer -> (key variant, value variant), empty with plain maps.
        average_bits: code bits per value of `schedule`.
        repair: what measured swaps changed, or None.
        choices: every layer's variants with their scores, empty with plain maps.
    """

    schedule: Schedule
    maps: dict[int, LayerMaps] | None
    table: Table
    variants: dict[int, tuple[str, str]]
    average_bits: float
    repair: Repair | None = None
    choices: list[Choice] = field(default_factory=list)


def calibrate(
    model: torch.nn.Module,
    windows: torch.Tensor,
    layers: Mapping[int, LayerMaps],
    *,
    recall: torch.Tensor | None = None,
    bits: float | None = None,
    memory: Memory | None = None,
    limits: Mapping[str, float] | None = None,
    widths: Sequence[int] = (1, 2, 3, 4),
    window: int = 128,
    sinks: int = 4,
    maps: Literal["plain", "auto"] = "auto",
    metric: Metric = "taylor",
    repair_evaluations: int = 0,
    stride: int = 2,
    context: int = 0,
    seed: int = 0,
    journal: str | Path | None = None,
    progress: bool = False,
    report: Callable[[str], None] | None = None,
) -> CalibrationResult:
    """Choose maps and bits for the quantised layers of a model.

    Args:
        model: transformers causal LM in eval mode, float32 or bfloat16.
        windows: int64 [n, N], n >= 3, calibration text; the first two thirds give the statistics (with plain maps
            there are none and all windows give sensitivities), the rest the sensitivities.
        recall: int64 [m, N], text of another kind (see `tq_ao.recall`) that shares in statistics and sensitivities, two
            thirds and one third like `windows`, but not in what is measured.
        layers: layer index -> its plain maps (what the cache would use uncalibrated); exactly these are quantised.
        bits: budget, average code bits per value.
        memory: budget in bytes instead, with layers kept exact on offer; `maps` of a packed layer are counted as they
            come out, whatever it says of them.
        limits: take the smallest budget up to that one whose schedule measures at most these losses on the sensitivity
            windows, all of them: "max_kl" (nats), "max_ppl" (rise of perplexity in percent); none takes all of it.
        widths: code widths on offer.
        maps: "plain" keeps `layers`' maps; "auto" calibrates and chooses a variant per layer.
        metric: sensitivity the allocation uses.
        repair_evaluations: measured swaps to try, on the sensitivity windows.
        stride: positions evaluated in measurements (1 is all).
        context: tokens the cache is to hold: windows for statistics and sensitivities are read at positions spread over
            as many (`capture.window_start`); measurements are not.  0: all stand at the beginning.
        journal: file that lets a killed run continue; give a different one per model.
        progress: tqdm bars.  report: called with one-line messages.

    Returns:
        CalibrationResult.

    Raises:
        ValueError: too few windows, no budget or two, one that no schedule fits, or `limits` that it cannot meet.
    """
    if windows.shape[0] < 3:
        raise ValueError(
            f"expected at least 3 calibration windows, got {windows.shape[0]}; give more text or shorter windows"
        )
    budget = _budget(bits, memory)
    say = report or (lambda message: None)
    recall = windows[:0] if recall is None else recall
    settings = (recall.shape[0], maps, metric, window, sinks, seed, context, widths, KEY_CHOICES, VALUE_CHOICES)
    log = Journal(journal, _fingerprint(model, layers, torch.cat([windows, recall]), *settings)) if journal else None
    shape = Shape({i: tuple(m.key_shift.shape) for i, m in layers.items()})  # type: ignore[misc]
    device = device_of(model)
    plain = {i: m.to(device) for i, m in layers.items()}
    chosen_maps, variants, choices = plain, {}, []
    measured, scored = windows, torch.cat([windows, recall])
    if maps == "auto":
        seen, scored, measured = divided(windows, recall)
        statistics = collect(
            model, seen, sorted(layers), window=window, sinks=sinks, seed=seed, context=context, progress=progress
        )
        choices = choose_variants(
            model, scored, plain, statistics, window=window, sinks=sinks, context=context, seed=seed,
            progress=progress, journal=log,
        )  # fmt: skip
        chosen_maps = {c.layer: c.maps for c in choices}
        variants = {c.layer: (c.key_variant, c.value_variant) for c in choices}
        del statistics
    table = sensitivity(
        model, scored, chosen_maps, metric, bits=widths, compensate=maps == "auto", window=window, sinks=sinks,
        context=context, seed=seed, journal=log, progress=progress,
    )  # fmt: skip

    def counted(m: Mapping[int, LayerMaps]) -> Shape:
        return shape if memory is None else replace(memory, maps={i: maps_bytes(one) for i, one in m.items()})

    def final(s: Schedule) -> dict[int, LayerMaps]:
        return {i: compensated(chosen_maps[i], *pair) for i, pair in s.items()} if maps == "auto" else plain

    def plans(s: Schedule, m: Mapping[int, LayerMaps]) -> dict[int, LayerPlan]:
        return {i: LayerPlan(*pair, m[i]) for i, pair in s.items()}

    sizes, exact = counted(chosen_maps), memory is not None
    within = partial(knapsack, table, sizes, bits=widths, exact=exact)
    schedule = within(budget)
    if limits or repair_evaluations:
        evaluate = Evaluator(model, measured, window=window, sinks=sinks, stride=stride)
    if limits:
        low, high = smallest(sizes, offered(widths, exact)), budget if exact else min(budget, max(widths))
        found = meet(
            limits, within, lambda s: losses(evaluate(plans(s, final(s)))),
            low=low, high=high, step=max((high - low) / 24, 1e-6) if exact else 0.125, unit=sizes.unit,
        )  # fmt: skip
        budget, schedule = found.budget, found.schedule
        say(
            f"{describe(limits, found.values)} at {amount(budget, sizes.unit)}, the fewest found to stay within "
            f"{describe(limits)} on the calibration text"
        )
    say(f"additive schedule: {shape.average(schedule):.3f} bits, predicted KL {additive_cost(table, schedule):.5f}")
    fixed: Repair | None = None
    if repair_evaluations:
        fixed = repair(
            schedule, lambda s: evaluate(plans(s, final(s))).kl, table, sizes, budget,
            evaluations=repair_evaluations, bits=widths,
            report=lambda move, value, accepted: say(f"{move}: KL {value:.5f} {'kept' if accepted else 'undone'}"),
        )  # fmt: skip
        schedule = fixed.schedule
    kept = {i: m.to("cpu") for i, m in final(schedule).items() if schedule[i] != (EXACT, EXACT)}
    return CalibrationResult(
        schedule, kept if maps == "auto" else None, table, variants, shape.average(schedule), repair=fixed,
        choices=choices,
    )  # fmt: skip


def divided(windows: torch.Tensor, recall: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Calibration text by what it is for.

    Returns:
        Two thirds of both kinds, for statistics; the rest of both, for variants and sensitivities; of that rest the
        windows that are ordinary text, for measurements.
    """
    (seen, rest), (seen_recall, rest_recall) = (x.tensor_split([x.shape[0] * 2 // 3]) for x in (windows, recall))
    return torch.cat([seen, seen_recall]), torch.cat([rest, rest_recall]), rest


def collect(
    model: torch.nn.Module, windows: torch.Tensor, layers: Sequence[int], *, window: int, sinks: int, seed: int,
    context: int = 0, gradient: bool = True, progress: bool = False,
) -> dict[int, LayerStatistics]:  # fmt: skip
    """Statistics of the given layers over windows [n, N], one window at a time."""
    statistics = {i: LayerStatistics() for i in layers}
    for n, ids in enumerate(bar(windows.split(1), "statistics", progress)):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + 500_009 + n)
        start = window_start(n, ids.shape[1], context)
        traces = trace(model, ids.to(device_of(model)), gradient=gradient, generator=generator, skip=SKIP, start=start)
        for i in layers:
            t = traces.pop(i)
            accumulate(statistics[i], t, window, sinks)
            if not n:
                statistics[i].readout = readout_gram(t.call)
    return statistics


def _budget(bits: float | None, memory: Memory | None) -> float:
    if memory is not None and bits is None:
        return memory.mib
    if bits is not None and memory is None:
        return bits
    raise ValueError(f"expected a budget of bits or of memory, got {bits} and {memory}; give one of them")


def _fingerprint(
    model: torch.nn.Module, layers: Mapping[int, LayerMaps], windows: torch.Tensor, *settings: object
) -> list[object]:
    """Of the model's weights, the plain maps and the text, by sums; of the rest, as it is written."""
    weights = [_sum(p) for p in model.parameters()]
    return [
        __version__, type(model).__name__, sum(p.numel() for p in model.parameters()),
        str(next(model.parameters()).dtype), weights, [(i, _sum(maps.key)) for i, maps in sorted(layers.items())],
        list(windows.shape), int((windows * torch.arange(1, windows.numel() + 1).view_as(windows)).sum()),
        str(settings),
    ]  # fmt: skip


def _sum(x: torch.Tensor) -> float:
    """Of some 4096 entries, the same ones each time."""
    plain = x.dequantize() if is_traceable_wrapper_subclass(x) else x  # torchao's weights
    flat = plain.detach().float().flatten()
    return flat[:: max(1, flat.numel() // 4096)].double().sum().item()
