"""transformers' own quantised caches (`cache_implementation="quantized"`: optimum-quanto, hqq), as baselines.

Their layers are called as they are, so what a query reads is what decoding would read.  They differ from ours in more
than rounding: no sinks; up to `window` recent tokens are exact, half of them on average; and whenever the window is
full everything held is read back, put behind it and rounded again.  The packages are optional.
"""

import contextlib
import importlib.metadata
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from transformers import QuantizedCache

from tq_ao.cache import kv_heads
from tq_ao.measure.capture import AttentionCall, Handler, exact
from tq_ao.measure.simulate import softcapped, softmax_with_sink

BITS = (2, 4)  # what both take: quanto has no 3 bits, hqq's 3-bit unpacking fails on tensors of four dimensions
GROUP = 64  # transformers' default

PACKAGES = {"quanto": "optimum-quanto", "hqq": "hqq"}


class Kind(NamedTuple):
    """A backend and its axes.

    quanto's 0 and hqq's 1 are the recommended axes: groups of neighbouring channels of one token.  quanto's -1 makes
    groups of tokens per channel, as KIVI has for keys; it needs prompts whose tokens fill whole groups.
    """

    backend: str
    axis_key: int
    axis_value: int


KINDS = {
    "transformers quanto": Kind("quanto", 0, 0),
    "transformers quanto, keys per channel": Kind("quanto", -1, 0),
    "transformers hqq": Kind("hqq", 1, 1),
}


def quantized_cache(config: Any, kind: Kind, bits: int, window: int) -> QuantizedCache:
    """An empty cache of transformers.

    Raises:
        ImportError: the backend's package is not installed.
        ValueError: transformers has no such cache for this model (one with sliding-window layers).
    """
    return QuantizedCache(
        kind.backend, config, nbits=bits, axis_key=kind.axis_key, axis_value=kind.axis_value, q_group_size=GROUP,
        residual_length=window,
    )  # fmt: skip


def unavailable(config: Any, kind: Kind, window: int) -> str | None:
    """Why a model cannot have this cache here, in the words of transformers; None if it can."""
    try:
        quantized_cache(config, kind, BITS[0], window)
    except (ImportError, ValueError) as error:
        return " ".join(str(error).split())
    heads = kv_heads(config.get_text_config(decoder=True))
    if kind.axis_key == -1 and heads * window % GROUP:
        return f"{heads} KV heads of {window} tokens do not fill groups of {GROUP} tokens"
    return None


def versions() -> dict[str, str]:
    """Versions of the optional packages that are installed, for result files."""
    found = {}
    for package in PACKAGES.values():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def stored_bits(bits: int) -> float:
    """Stored bits per value: codes, and a 16-bit scale and offset per group (their dtype in a half-precision model)."""
    return bits + 32 / GROUP


def reads(
    layer: Any, k: torch.Tensor, v: torch.Tensor, window: int
) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
    """What the queries of each block read when the first block is the prompt and then tokens come one by one.

    The window fills and is emptied in step with the blocks, so within a block the rounded part does not change.  All
    but the last token of a block go in together: transformers asks when a call begins whether that call fills the
    window (releases before 5.24) or when it ends (since), and one last token means the same to both.

    Args:
        layer: a layer of an empty `quantized_cache` with the same window.
        k, v: [B, H, N, D].
        window: >= 2.

    Yields:
        (first, end, keys, values): query i of first .. end - 1 reads keys and values [B, H, end, D] up to i.
    """
    for first in range(0, k.shape[2], window):
        end = min(first + window, k.shape[2])
        cuts = (0, end) if first == 0 else (first, end - 1, end)
        for a, b in zip(cuts, cuts[1:], strict=False):
            if b > a:
                keys, values = layer.update(k[:, :, a:b], v[:, :, a:b])
        yield first, end, keys, values


def transformers_quantized(config: Any, layers: set[int], kind: Kind, bits: int, *, window: int) -> Handler:
    """An attention handler that reads keys and values of `layers` from transformers' quantised cache."""

    def attention(call: AttentionCall) -> torch.Tensor:
        if call.layer not in layers:
            return exact(call)
        layer = quantized_cache(config, kind, bits, window).layers[call.layer]
        out = torch.empty_like(call.q)
        q = call.q.unflatten(1, (call.k.shape[1], -1)) * call.scaling
        position = torch.arange(call.q.shape[2], device=call.q.device)
        for first, end, keys, values in reads(layer, call.k, call.v, window):
            s = softcapped(q[:, :, :, first:end] @ keys[:, :, None].mT, call)
            s = s.masked_fill(position[:end] > position[first:end, None], -torch.inf)
            out[:, :, first:end] = (softmax_with_sink(s, call) @ values[:, :, None]).flatten(1, 2)
        return out

    return attention
