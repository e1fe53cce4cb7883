"""Choose each layer's maps by their measured effect: no closed form is best everywhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from tq_ao.calibration.fisher import fisher_kl, sample_rows
from tq_ao.calibration.gain import compensated
from tq_ao.calibration.journal import Journal
from tq_ao.calibration.sensitivity import bar, device_of, side_delta
from tq_ao.calibration.statistics import LayerStatistics
from tq_ao.calibration.transforms import KEY_CHOICES, VALUE_CHOICES, Side, joined, key_maps, value_maps
from tq_ao.measure.capture import trace, window_start
from tq_ao.measure.metrics import SKIP
from tq_ao.rotation import LayerMaps

PROBE_BITS = (2, 3)


@dataclass(frozen=True)
class Choice:
    """A layer's maps, the variants they are, and the Fisher KL of every variant at the probe widths."""

    layer: int
    maps: LayerMaps
    key_variant: str
    value_variant: str
    scores: dict[str, float]  # "key/<variant>/<bits>" -> nats


def candidates(
    plain: LayerMaps, statistics: LayerStatistics, key_variants: Sequence[str], value_variants: Sequence[str]
) -> dict[tuple[str, str], LayerMaps]:
    """(side, variant) -> maps whose other side is plain."""
    key = Side(plain.key, plain.query, plain.key_shift)
    value = Side(plain.value, plain.output, plain.value_shift)
    found = {}
    for variant in key_variants:
        found["key", variant] = joined(key_maps(statistics, variant, plain.key), value)
    for variant in value_variants:
        found["value", variant] = joined(key, value_maps(statistics, variant, plain.value))
    return found


def choose_variants(
    model: torch.nn.Module,
    windows: torch.Tensor,
    plain: Mapping[int, LayerMaps],
    statistics: Mapping[int, LayerStatistics],
    *,
    key_variants: Sequence[str] = KEY_CHOICES,
    value_variants: Sequence[str] = VALUE_CHOICES,
    window: int,
    sinks: int,
    rows: int = 128,
    context: int = 0,
    seed: int = 0,
    journal: Journal | None = None,
    progress: bool = False,
) -> list[Choice]:
    """Score every variant of every layer on windows the statistics did not see, and keep the best per side.

    The score is the Fisher KL summed over PROBE_BITS, each divided by the plain variant's.  A layer whose W_o was not
    found has no value variants that read through it.
    """
    scores: dict[int, dict[str, float]] = {i: {} for i in plain}
    values = {i: _readable(statistics[i], value_variants) for i in plain}
    built = {i: candidates(plain[i], statistics[i], key_variants, values[i]) for i in sorted(plain)}
    for n, ids in enumerate(bar(windows.split(1), "map variants", progress)):
        found = journal.get(f"variants/{n}") if journal is not None else None
        if found is None:
            found = {}
            generator = torch.Generator().manual_seed(seed * 1_000_003 + n)
            start = window_start(n, ids.shape[1], context)
            traces = trace(model, ids.to(device_of(model)), gradient=True, generator=generator, skip=SKIP, start=start)
            for layer in sorted(plain):
                sample = sample_rows(traces.pop(layer), rows, window, sinks, generator)
                for (side, variant), maps in built[layer].items():
                    for b in PROBE_BITS:
                        delta = side_delta(sample, side, compensated(maps, b, b), b)
                        found[f"{layer}/{side}/{variant}/{b}"] = fisher_kl(sample, delta)
            if journal is not None:
                journal.put(f"variants/{n}", found)
        for name, value in found.items():
            layer, _, entry = name.partition("/")
            scores[int(layer)][entry] = scores[int(layer)].get(entry, 0.0) + value
    return [_best(i, plain[i], statistics[i], scores[i], key_variants, values[i]) for i in sorted(plain)]


def _readable(statistics: LayerStatistics, value_variants: Sequence[str]) -> list[str]:
    return [v for v in value_variants if statistics.readout is not None or not v.startswith("attention")]


def _best(
    layer: int, plain: LayerMaps, statistics: LayerStatistics, scores: dict[str, float],
    key_variants: Sequence[str], value_variants: Sequence[str],
) -> Choice:  # fmt: skip
    def relative(side: str, variant: str) -> float:
        return sum(scores[f"{side}/{variant}/{b}"] / max(scores[f"{side}/plain/{b}"], 1e-30) for b in PROBE_BITS)

    key_variant = min(key_variants, key=lambda variant: relative("key", variant))
    value_variant = min(value_variants, key=lambda variant: relative("value", variant))
    maps = joined(key_maps(statistics, key_variant, plain.key), value_maps(statistics, value_variant, plain.value))
    return Choice(layer, maps, key_variant, value_variant, scores)
