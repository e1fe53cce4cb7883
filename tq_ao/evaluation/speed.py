"""Time of a decode step of a whole model: packed cache against the model's own, side by side in one process."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from tq_ao.cache import TurboQuantCache, cache_argument
from tq_ao.config import TurboQuantConfig
from tq_ao.evaluation.decode_kl import prove_packed


@torch.no_grad()
def decode_speed(
    model: PreTrainedModel, length: int, bits: list[int], *, rounds: int = 7, steps: int = 8, seed: int = 0
) -> list[dict[str, Any]]:
    """Milliseconds of one eager decode step after `length` random tokens, caches in turn, `rounds` times.

    Args:
        model: causal LM with `tq_ao` attached.
        length: tokens in the cache, batch 1.
        bits: uniform widths to time.
        rounds: measurements of each cache; the order is reversed every other round.
        steps: decode steps per measurement.

    Returns:
        Rows {"cache", "ms_median", "ms_p10", "ms_p90", "ratio_median", "ratio_p10", "ratio_p90"}; ratios are taken
        round by round against the exact cache.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, model.config.get_text_config().vocab_size, (1, length), generator=generator).to(model.device)
    caches: dict[str, Cache] = {"exact": DynamicCache(config=model.config)}
    caches |= {f"{b} bits": TurboQuantCache(model.config, TurboQuantConfig(bits=b)) for b in bits}
    for name, cache in caches.items():
        model(ids, **{cache_argument(model): cache})
        if isinstance(cache, TurboQuantCache):
            prove_packed(cache, name)
    times: dict[str, list[float]] = {name: [] for name in caches}
    for turn in range(rounds + 1):
        for name in list(caches)[:: -1 if turn % 2 else 1]:
            elapsed = _timed(partial(_steps, model, ids[:, :1], caches[name], steps), model.device)
            if turn:  # the first round warms up
                times[name].append(1e3 * elapsed / steps)
    rows = []
    for name, values in times.items():
        ratios = [a / b for a, b in zip(values, times["exact"], strict=True)]
        rows.append({"cache": name, **_spread("ms", values), **_spread("ratio", ratios)})
    return rows


def _steps(model: PreTrainedModel, token: torch.Tensor, cache: Cache, steps: int) -> None:
    given = {cache_argument(model): cache}
    for _ in range(steps):
        model(token, **given)


def _timed(run: Callable[[], None], device: torch.device) -> float:
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _spread(name: str, values: list[float]) -> dict[str, float]:
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return {f"{name}_median": statistics.median(values), f"{name}_p10": deciles[0], f"{name}_p90": deciles[-1]}
