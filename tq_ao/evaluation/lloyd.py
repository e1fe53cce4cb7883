"""TurboQuant as published (Zandieh et al., arXiv 2504.19874), as a baseline: random rotation and Lloyd-Max levels.

The packed cache has evenly spaced levels, because a code is then its own level; this is what the uneven levels of the
paper would have given.  They are simulated only: no layout holds them.  The scale is the least-squares one of our own
codec; the paper stores the norm, which for these levels is nearly the same (E[y level] = E[level**2]).
"""

from collections.abc import Mapping

import torch

from tq_ao.codebook import lloyd_max
from tq_ao.measure.capture import AttentionCall, Handler, exact
from tq_ao.measure.simulate import mixed_attention
from tq_ao.rotation import LayerMaps


def lloyd_max_rounded(y: torch.Tensor, bits: int) -> torch.Tensor:
    """Vectors [..., D] on their nearest Lloyd-Max levels, times the least-squares scale in fp16."""
    levels = torch.tensor(lloyd_max(bits), dtype=torch.float32, device=y.device)
    y = y.float()
    sigma = y.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
    nearest = levels[torch.bucketize(y / sigma, (levels[1:] + levels[:-1]) / 2)]
    scale = (y * nearest).sum(-1, keepdim=True) / nearest.square().sum(-1, keepdim=True)
    return nearest * scale.half().float()


def _seen(x: torch.Tensor, map: torch.Tensor, inverse: torch.Tensor, shift: torch.Tensor, bits: int) -> torch.Tensor:
    """What a reader sees of x [B, H, N, D]; map, inverse [H, D, D], shift [H, D]."""
    y = (x.float() - shift[:, None]) @ map
    return (lloyd_max_rounded(y, bits) @ inverse + shift[:, None]).to(x.dtype)


def lloyd(maps: Mapping[int, LayerMaps], bits: int, *, window: int, sinks: int) -> Handler:
    """An attention handler that reads old keys and values of the layers in (plain) `maps` from Lloyd-Max levels."""

    def attention(call: AttentionCall) -> torch.Tensor:
        m = maps.get(call.layer)
        if m is None:
            return exact(call)
        k_hat = _seen(call.k, m.key, m.query.mT, m.key_shift, bits)
        v_hat = _seen(call.v, m.value, m.output, m.value_shift, bits)
        return mixed_attention(call, k_hat, v_hat, window=window, sinks=sinks)

    return attention
