"""The attention and mask functions transformers calls for a model with a packed cache, and which models can do so."""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tq_ao.cache import find_decoder, head_dim, layer_types, longest_text, quantizable_layers, sliding_windows
from tq_ao.tensor import TurboQuantTensor, packed_attention
from tq_ao.tensor_ops import ATTENTION_NAME

# Families whose attention cannot be exchanged for the one here, and what theirs does.
UNSUPPORTED_MODELS = {
    name: what
    for what, names in (
        (
            "expands K and V from a latent form after the cache (latent attention)",
            "deepseek_v2 deepseek_v3 deepseek_v32 axk1 axk2 glm4_moe_lite glm_moe_dsa glm5_next kimi_linear "
            "longcat_flash minicpm3 mistral4 mistral_large4 youtu bailing_hybrid hy_v4 dots3_note dots3_note_text",
        ),
        (
            "works on K or V itself after the cache",
            "jetmoe bigbird_pegasus idefics mllama moonshine moonshine_streaming t5gemma diffllama doge git",
        ),
        ("takes a cache class of its own only", "minimax"),
    )
    for name in names.split()
}


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
        cut = 0 if key.new is None else key.new.shape[2] - query.shape[2]
        if cut > 0:  # layers that share another's K and V may want the newest tokens only (Gemma-4's logits_to_keep)
            query = F.pad(query, (0, 0, cut, 0))
        out = packed_attention(query, key, value, scale, softcap or 0.0, s_aux)
        out = out[:, :, cut:] if cut > 0 else out
        return out.transpose(1, 2).contiguous(), None
    if attention_mask is not None:
        attention_mask = attention_mask[..., : key.shape[2]]
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    return _eager(query, key, value, attention_mask, scaling, softcap, s_aux), None


def turboquant_mask(*args: Any, config: PreTrainedConfig, **kwargs: Any) -> torch.Tensor | None:
    """SDPA's mask, never left out where layers share K and V: Gemma-4 cuts their queries and the mask with them."""
    if getattr(config, "num_kv_shared_layers", None):
        kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(*args, config=config, **kwargs)


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
    AttentionMaskInterface.register(ATTENTION_NAME, turboquant_mask)


def exchange_attention(model: PreTrainedModel, name: str) -> None:
    """Set a registered attention function in a model.

    Raises:
        ValueError: a model whose attention stays its own.
    """
    model.set_attn_implementation(name)
    config: Any = find_decoder(model).config
    if config._attn_implementation != name:
        raise ValueError(
            f"{model.config.model_type}: expected a model whose attention can be exchanged through transformers' "
            "AttentionInterface, got one with an attention of its own; it cannot read packed K and V"
        )


def check_supported(config: PreTrainedConfig) -> None:
    """Raise ValueError, saying why, if a model of this config cannot have a packed KV cache."""
    text = config.get_text_config(decoder=True)
    kind = text.model_type
    what = UNSUPPORTED_MODELS.get(kind) or UNSUPPORTED_MODELS.get(config.model_type)
    if what is None and getattr(text, "kv_lora_rank", None):
        what = UNSUPPORTED_MODELS["deepseek_v3"]
    if what:
        raise ValueError(
            f"{kind}: its attention {what}, so keys and values cannot stay packed; use a model with ordinary "
            "multi-head, grouped-query or multi-query attention"
        )
    if config.is_encoder_decoder:
        raise ValueError(f"{kind}: expected a decoder-only model, got an encoder-decoder")
    try:
        dim = head_dim(text)
        value_dim = getattr(text, "v_head_dim", None) or dim
    except RuntimeError as error:  # transformers' configs with a value for each layer
        raise ValueError(
            f"{kind}: expected one head_dim in all layers, got several; a schedule packs layers of one shape"
        ) from error
    except AttributeError as error:
        raise ValueError(
            f"{kind}: has no attention layers that its config would describe ({error}), so no keys and values to pack"
        ) from error
    if value_dim != dim:
        raise ValueError(
            f"{kind}: expected keys and values of one head_dim, got {dim} and {value_dim}; a cache packs both alike"
        )
    if dim % 32:
        raise ValueError(
            f"{kind}: expected a head_dim that is a multiple of 32, got {dim}; layout v2 has no other shapes"
        )
    if not quantizable_layers(config):
        why = f"its layers are of type {', '.join(layer_types(config))}"
        windows = sliding_windows(config)
        if windows and len(layer_types(config)) == 1:
            why = (
                f"its layers see a sliding window of {' or '.join(map(str, windows))} tokens, fewer than the "
                f"{longest_text(text):g} it reads, and keep their own small cache"
            )
        raise ValueError(f"{kind}: no full-attention layers to pack; {why}")
