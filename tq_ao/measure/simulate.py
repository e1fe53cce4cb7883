"""A packed cache in one forward pass: each query reads quantised keys and values where the decode cache would.

Query i reads key j from the quantised copy when i - j >= window and j >= sinks, and exactly otherwise: what
token-by-token decoding does if each token is packed the moment it leaves the window.  (The cache packs whole
tiles of 32, so its tokens stay exact up to 31 steps longer; simulation errs on the pessimistic side.)
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from tq_ao.measure.capture import AttentionCall, Handler, exact
from tq_ao.reference import rounded
from tq_ao.rotation import LayerMaps

EXACT_BITS = 16
BLOCK = 64  # rows of the score matrix held at a time, to stay in a CPU cache; GPU_BLOCK keeps a GPU busy
GPU_BLOCK = 1024


@dataclass(frozen=True)
class LayerPlan:
    """What is done to one layer: bits of K and V (16 is exact) and the maps."""

    k_bits: int
    v_bits: int
    maps: LayerMaps


def requantize(
    x: torch.Tensor, map: torch.Tensor, inverse: torch.Tensor, shift: torch.Tensor, bits: int,
    feedback: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """What a reader sees of x after packing: quantise in mapped space and come back.

    Args:
        x: [B, H, N, D]; map, inverse: [H, D, D] (`query.mT` or `output` undo `key` and `value`); shift: [H, D].
        feedback: [H, D / 2, D / 2] or None.

    Returns:
        [B, H, N, D] in x's dtype.
    """
    if bits == EXACT_BITS:
        return x
    y = (x.float() - shift[:, None]) @ map
    return (rounded(y, bits, feedback) @ inverse + shift[:, None]).to(x.dtype)


def requantize_layer(k: torch.Tensor, v: torch.Tensor, plan: LayerPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """`requantize` of a layer's keys and values."""
    m = plan.maps
    k_hat = requantize(k, m.key, m.query.mT, m.key_shift, plan.k_bits, m.key_feedback)
    return k_hat, requantize(v, m.value, m.output, m.value_shift, plan.v_bits, m.value_feedback)


def row_blocks(tokens: int, device: torch.device, block: int | None = None) -> Iterator[tuple[int, int]]:
    """(first, end) of consecutive row blocks."""
    block = block or (GPU_BLOCK if device.type == "cuda" else BLOCK)
    for first in range(0, tokens, block):
        yield first, min(tokens, first + block)


def softcapped(s: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """Scaled scores after the model's softcap."""
    return call.softcap * torch.tanh(s / call.softcap) if call.softcap else s


def mixed_attention(
    call: AttentionCall, k_hat: torch.Tensor, v_hat: torch.Tensor, *, window: int, sinks: int, block: int | None = None
) -> torch.Tensor:
    """Attention output [B, Hq, N, D] where old keys and values are read from their quantised copies.

    Args:
        call: the exact layer.
        k_hat, v_hat: dequantised [B, H, N, D]; entries of the first `sinks` tokens are ignored.
        window: pairs closer than this are exact.
        sinks: tokens at the start that are always exact.
    """
    dtype, call = call.q.dtype, call.float()
    heads, tokens = call.k.shape[1], call.q.shape[2]
    q = (call.q * call.scaling).unflatten(1, (heads, -1))
    k_hat, v_hat = (
        torch.cat([x[:, :, :sinks], x_hat[:, :, sinks:]], 2) for x, x_hat in ((call.k, k_hat), (call.v, v_hat))
    )
    out = torch.empty_like(call.q)
    age = torch.arange(tokens, device=call.q.device)
    for first, end in row_blocks(tokens, call.q.device, block):
        low = 0 if call.sliding is None else max(0, first - call.sliding + 1)
        mixed = max(low, first - window + 1)  # columns from here on are recent for some row of the block
        fresh = max(mixed, end - window)  # and from here on for every row
        rows = q[:, :, :, first:end].flatten(2, 3)
        s = torch.cat([rows @ k_hat[:, :, low:fresh].mT, rows @ call.k[:, :, fresh:end].mT], -1)
        s = s.unflatten(2, (-1, end - first))
        old = age[first:end, None] - age[mixed:fresh] >= window
        middle = slice(mixed - low, fresh - low)
        if fresh > mixed:
            precise = (rows @ call.k[:, :, mixed:fresh].mT).unflatten(2, (-1, end - first))
            s[..., middle] = torch.where(old, s[..., middle], precise)
        s = softcapped(s, call)
        gap = age[first:end, None] - age[low:end]
        hidden = gap < 0 if call.sliding is None else (gap < 0) | (gap >= call.sliding)
        s.masked_fill_(hidden, -torch.inf)
        p = softmax_with_sink(s, call).flatten(2, 3)
        o = p[..., : mixed - low] @ v_hat[:, :, low:mixed] + p[..., fresh - low :] @ call.v[:, :, fresh:end]
        if fresh > mixed:
            weight = p[..., middle]
            from_old = weight * old.repeat(q.shape[2], 1)
            o += from_old @ v_hat[:, :, mixed:fresh] + (weight - from_old) @ call.v[:, :, mixed:fresh]
        out[:, :, first:end] = o.unflatten(2, (-1, end - first)).flatten(1, 2)
    return out.to(dtype)


def softmax_with_sink(s: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """Softmax of [B, H, G, n, keys], with the virtual key of models that have one."""
    if call.sink_logits is None:
        return torch.softmax(s, -1)
    extra = call.sink_logits.to(s.dtype).view(1, *s.shape[1:3], 1, 1).expand(*s.shape[:-1], 1)
    return torch.softmax(torch.cat([s, extra], -1), -1)[..., :-1]


def simulated(call: AttentionCall, plans: Mapping[int, LayerPlan], window: int, sinks: int) -> torch.Tensor:
    """Attention of a layer under its plan; layers without a plan, or with both at 16 bits, are exact."""
    plan = plans.get(call.layer)
    if plan is None or plan.k_bits == plan.v_bits == EXACT_BITS:
        return exact(call)
    k_hat, v_hat = requantize_layer(call.k.float(), call.v.float(), plan)
    return mixed_attention(call, k_hat, v_hat, window=window, sinks=sinks)


def handler(plans: Mapping[int, LayerPlan], *, window: int, sinks: int) -> Handler:
    """An attention handler for `capture.intercept` that simulates the packed cache of `plans`."""
    return partial(simulated, plans=plans, window=window, sinks=sinks)
