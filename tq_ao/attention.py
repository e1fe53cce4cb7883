"""The attention and mask functions transformers calls for a model with a packed cache."""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tq_ao.tensor import TurboQuantTensor, packed_attention
from tq_ao.tensor_ops import ATTENTION_NAME


def turboquant_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of query [B, Hq, q, D] over whatever the layer's cache returned; gives ([B, q, Hq, D], None).

    Packed K and V carry their own lengths and left padding, so the mask is read only for ordinary tensors
    (prefill, sliding-window layers, no cache).
    """
    if isinstance(key, TurboQuantTensor) and isinstance(value, TurboQuantTensor):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = packed_attention(query, key, value, scale, softcap or 0.0, s_aux)
        return out.transpose(1, 2).contiguous(), None
    if attention_mask is not None:
        attention_mask = attention_mask[..., : key.shape[2]]
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    return _eager(query, key, value, attention_mask, scaling, softcap, s_aux), None


def _eager(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
) -> torch.Tensor:
    """Dense attention with logit soft-capping (Gemma-2) or sink logits (gpt-oss), which SDPA lacks."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.mT) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    q_len, kv_len = scores.shape[-2:]
    if attention_mask is None and q_len > 1:
        attention_mask = torch.ones(q_len, kv_len, dtype=torch.bool, device=query.device).tril(kv_len - q_len)
    if attention_mask is not None:
        lowest = torch.finfo(scores.dtype).min
        scores = (
            scores.masked_fill(~attention_mask, lowest)
            if attention_mask.dtype == torch.bool
            else scores + attention_mask
        )
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)], -1)
    weights = torch.softmax(scores.float(), -1).to(query.dtype)[..., :kv_len]
    return (weights @ value).transpose(1, 2).contiguous()


def register() -> None:
    """Register both functions under "turboquant" (without the mask, transformers would silently pass None)."""
    AttentionInterface.register(ATTENTION_NAME, turboquant_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
