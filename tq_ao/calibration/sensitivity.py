"""What quantising one layer's K or V does, by five yardsticks behind one interface.

    weight      mean squared error of the quantised k_proj / v_proj rows (the article's rule)
    activation  mean squared error of the quantised keys / values
    output      mean squared error of the attention output
    taylor      first-order (Fisher) KL of the next token, one backward pass per window for all layers
    kl          measured KL with only that side of that layer quantised (one forward pass per entry)

`taylor` is the default: close to `kl` at a fiftieth of the passes.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch

from tq_ao.calibration.fisher import Rows, fisher_kl, key_delta, sample_rows, value_delta
from tq_ao.calibration.gain import compensated
from tq_ao.calibration.journal import Journal
from tq_ao.codebook import Role
from tq_ao.measure.capture import Trace, trace, window_start
from tq_ao.measure.evaluator import Evaluator
from tq_ao.measure.metrics import SKIP
from tq_ao.measure.simulate import EXACT_BITS, LayerPlan, requantize
from tq_ao.rotation import LayerMaps

Metric = Literal["weight", "activation", "output", "taylor", "kl"]
METRICS: tuple[Metric, ...] = ("weight", "activation", "output", "taylor", "kl")
Table = dict[tuple[int, str, int], float]  # (layer, "key" | "value", bits) -> sensitivity


def sensitivity(
    model: torch.nn.Module,
    windows: torch.Tensor,
    maps: Mapping[int, LayerMaps],
    metric: Metric = "taylor",
    *,
    bits: Sequence[int] = (1, 2, 3, 4),
    compensate: bool = False,
    window: int = 128,
    sinks: int = 4,
    rows: int = 192,
    context: int = 0,
    seed: int = 0,
    journal: Journal | None = None,
    progress: bool = False,
) -> Table:
    """Sensitivity of every (layer, side, bits).

    Args:
        model: transformers causal LM in eval mode.
        windows: int64 [n, N] calibration text (unused by "weight").
        maps: layer -> maps; only these layers are scored.
        metric: one of METRICS.
        compensate: scale the maps for each width (see gain.py), as calibrated schedules do.
        rows: query rows sampled per window ("output", "taylor").
        context: see `calibrate` ("activation", "output", "taylor").
        journal: remembers finished windows or entries of a killed run.
        progress: show a tqdm bar.

    Raises:
        ValueError: unknown metric.
    """
    by_width = {b: {i: compensated(m, b, b) for i, m in maps.items()} if compensate else maps for b in bits}
    if metric == "weight":
        return _weight(model, maps, bits)
    if metric == "kl":
        return _measured(model, windows, by_width, window, sinks, journal, progress)
    if metric not in METRICS:
        raise ValueError(f"expected metric in {METRICS}, got {metric!r}")
    total: Table = {}
    positions = windows.shape[0] * max(1, windows.shape[1] - SKIP)
    for n, ids in enumerate(bar(windows.split(1), f"{metric} sensitivity", progress)):
        key = f"{metric}/{n}"
        found = journal.get(key) if journal is not None else None
        if found is None:
            found = {}
            generator = torch.Generator().manual_seed(seed * 1_000_003 + n)
            start = window_start(n, ids.shape[1], context)
            traces = trace(
                model,
                ids.to(device_of(model)),
                gradient=metric == "taylor",
                generator=generator,
                skip=SKIP,
                start=start,
            )
            for layer in sorted(maps):
                for entry, value in _score(
                    traces.pop(layer), {b: by_width[b][layer] for b in bits}, metric, window, sinks, rows, generator
                ):
                    found[f"{layer}/{entry}"] = value
            if journal is not None:
                journal.put(key, found)
        for name, value in found.items():
            layer, side, width = name.split("/")
            place = (int(layer), side, int(width))
            total[place] = total.get(place, 0.0) + value / (positions if metric == "taylor" else windows.shape[0])
    return total


def _score(t: Trace, by_width: Mapping[int, LayerMaps], metric: str, window: int, sinks: int, rows: int, generator):  # type: ignore[no-untyped-def]
    """("side/bits", value) of one layer on one window."""
    if metric == "activation":
        k, v = t.call.k, t.call.v
        for b, maps in by_width.items():
            k_hat = requantize(k, maps.key, maps.query.mT, maps.key_shift, b, maps.key_feedback)
            v_hat = requantize(v, maps.value, maps.output, maps.value_shift, b, maps.value_feedback)
            yield f"key/{b}", (k_hat - k)[:, :, sinks:].square().mean().item()
            yield f"value/{b}", (v_hat - v)[:, :, sinks:].square().mean().item()
        return
    if t.grad is None:
        t.grad = torch.zeros_like(t.out)
    sample = sample_rows(t, rows, window, sinks, generator)
    for b, maps in by_width.items():
        for side in ("key", "value"):
            delta = side_delta(sample, side, maps, b)
            yield f"{side}/{b}", fisher_kl(sample, delta) if metric == "taylor" else delta.square().mean().item()


def side_delta(sample: Rows, side: str, maps: LayerMaps, bits: int) -> torch.Tensor:
    """Change of the sampled attention outputs when the packed "key" or "value" side has `bits` bits."""
    return key_delta(sample, maps, bits) if side == "key" else value_delta(sample, maps, bits)


def _weight(model: torch.nn.Module, maps: Mapping[int, LayerMaps], bits: Sequence[int]) -> Table:
    table: Table = {}
    for module in model.modules():
        attention: Any = module
        layer: Any = getattr(module, "layer_idx", None)
        if layer not in maps or not hasattr(module, "k_proj"):
            continue
        m = maps[layer]
        heads, dim = m.key_shift.shape
        zero = torch.zeros_like(m.key_shift)
        sides: tuple[tuple[Role, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], ...] = (
            ("key", attention.k_proj.weight, m.key, m.query.mT, m.key_feedback),
            ("value", attention.v_proj.weight, m.value, m.output, m.value_feedback),
        )
        for side, weight, forward, back, feedback in sides:
            vectors = weight.detach().float().unflatten(0, (heads, dim)).mT[None]  # [1, H, hidden, D]
            for b in bits:
                error = requantize(vectors, forward, back, zero, b, feedback) - vectors
                table[layer, side, b] = error.square().mean().item()
    if missing := set(maps) - {i for i, _, _ in table}:
        raise ValueError(
            f"metric 'weight' needs k_proj and v_proj, not found in layers {sorted(missing)}; use 'taylor'"
        )
    return table


def _measured(model, windows, by_width, window, sinks, journal, progress) -> Table:  # type: ignore[no-untyped-def]
    evaluate = Evaluator(model, windows, window=window, sinks=sinks)
    table: Table = {}
    places = [(i, side, b) for b, maps in by_width.items() for i in sorted(maps) for side in ("key", "value")]
    for layer, side, b in bar(places, "measured KL", progress):
        key = f"kl/{layer}/{side}/{b}"
        value = journal.get(key) if journal is not None else None
        if value is None:
            k_bits, v_bits = (b, EXACT_BITS) if side == "key" else (EXACT_BITS, b)
            value = evaluate({layer: LayerPlan(k_bits, v_bits, by_width[b][layer])}).kl
            if journal is not None:
                journal.put(key, value)
        table[layer, side, b] = value
    return table


def bar(items: Sequence[Any], label: str, progress: bool) -> Iterable[Any]:
    """The items, behind a progress bar if asked for."""
    if not progress:
        return items
    from tqdm import tqdm

    return tqdm(items, desc=label)


def device_of(model: torch.nn.Module) -> torch.device:
    """Where the model's inputs go."""
    return next(model.parameters()).device
