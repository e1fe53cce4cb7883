"""Random models of a few thousand weights in real architectures, with sharp enough logits to have clear winners."""

from dataclasses import fields

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

# What the installed transformers calls a cache, given to a forward or to `generate` or in what they return.
CACHE = "cache" if "cache" in [f.name for f in fields(CausalLMOutputWithPast)] else "past_key_values"

_COMMON = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip


def config(kind: str, **changes: object) -> PreTrainedConfig:
    """A small config: llama, qwen2 (k_proj bias), gemma2 (soft-cap), gemma3 (mostly sliding), gpt_oss (sink logits).

    phi4_mini is what Phi-4-mini's config.json says and others' do not: a window in every layer that no text outgrows,
    part of each head rotated, and other frequencies in texts longer than 1024 tokens.
    """
    fields = {**_COMMON, "num_hidden_layers": 3, **changes}
    if kind == "gemma3":
        return Gemma3TextConfig(
            **{
                "sliding_window": 24,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                **fields,
                "num_hidden_layers": 4,
            }
        )
    if kind == "gemma2":
        return Gemma2Config(
            **{**fields, "sliding_window": 24, "layer_types": ["full_attention"] * 3, "query_pre_attn_scalar": 32}
        )
    if kind == "gpt_oss":
        return GptOssConfig(
            **{**fields, "num_local_experts": 2, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 3}
        )
    if kind == "phi4_mini":
        stretch = {"short_factor": [1.0] * 12, "long_factor": [1.0 + i for i in range(12)]}
        rope = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75, **stretch}
        return Phi3Config(
            **{
                **fields,
                "hidden_size": 128,
                "sliding_window": 8192,
                "original_max_position_embeddings": 1024,
                "rope_parameters": rope,
                **changes,
            }
        )
    return {"llama": LlamaConfig, "qwen2": Qwen2Config}[kind](**fields)


def model(kind: str = "llama", **changes: object) -> PreTrainedModel:
    """A random float32 model in eval mode."""
    built = AutoModelForCausalLM.from_config(config(kind, **changes)).eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "lm_head.weight")):
                parameter.mul_(12)
    return built
