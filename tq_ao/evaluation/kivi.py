"""KIVI-style quantisation (Liu et al., arXiv 2402.02750), as a baseline: min-max integers, no rotation.

Keys in groups of `group` tokens per channel, values in groups of `group` channels per token, an fp16 scale and
minimum per group: bits + 32 / group stored bits per value.  The window and sinks are exact here too.
"""

import torch

from tq_ao.measure.capture import AttentionCall, Handler, exact
from tq_ao.measure.simulate import mixed_attention

GROUP = 32


def min_max(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Asymmetric min-max rounding over the last axis; scale and minimum in fp16."""
    low = x.amin(-1, keepdim=True).half().float()
    step = ((x.amax(-1, keepdim=True) - low) / (2**bits - 1)).half().float().clamp_min(1e-8)
    return ((x - low) / step).round().clamp(0, 2**bits - 1) * step + low


def kivi_keys(k: torch.Tensor, bits: int, sinks: int, group: int = GROUP) -> torch.Tensor:
    """Keys [B, H, N, D] rounded per channel over groups of tokens counted from the first token after the sinks."""
    body = k[:, :, sinks:].float()
    count = body.shape[2]
    padded = torch.nn.functional.pad(body, (0, 0, 0, -count % group), mode="replicate") if count % group else body
    grouped = padded.unflatten(2, (-1, group)).transpose(-1, -2)  # [B, H, groups, D, group]
    body = min_max(grouped, bits).transpose(-1, -2).flatten(2, 3)[:, :, :count]
    return torch.cat([k[:, :, :sinks], body.to(k.dtype)], 2)


def kivi_values(v: torch.Tensor, bits: int, group: int = GROUP) -> torch.Tensor:
    """Values [B, H, N, D] rounded per token over groups of channels."""
    return min_max(v.float().unflatten(-1, (-1, group)), bits).flatten(-2).to(v.dtype)


def kivi(layers: set[int], bits: int, *, window: int, sinks: int) -> Handler:
    """An attention handler that reads old keys and values of `layers` after KIVI-style rounding."""

    def attention(call: AttentionCall) -> torch.Tensor:
        if call.layer not in layers:
            return exact(call)
        k_hat, v_hat = kivi_keys(call.k, bits, sinks), kivi_values(call.v, bits)
        return mixed_attention(call, k_hat, v_hat, window=window, sinks=sinks)

    return attention


def stored_bits(bits: int, group: int = GROUP) -> float:
    """Stored bits per value: codes, fp16 scale and fp16 minimum."""
    return bits + 32 / group
