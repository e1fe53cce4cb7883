"""What the config.json of each recipe's model says about its shape; rope and token ids change no shape."""

from transformers import AutoConfig, PreTrainedConfig

from tq_ao.cache import head_dim

ARCHITECTURES = {
    "smollm2-135m": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "vocab_size": 49152,
    },
    "gemma-3-270m": {
        "model_type": "gemma3_text", "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "max_position_embeddings": 32768,
        "vocab_size": 262144, "sliding_window": 512, "query_pre_attn_scalar": 256,
    },
    "gemma-3-1b": {
        "model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "max_position_embeddings": 32768,
        "vocab_size": 262144, "sliding_window": 512, "query_pre_attn_scalar": 256,
    },
    "gemma-2b": {
        "model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18,
        "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "max_position_embeddings": 8192,
        "vocab_size": 256000,
    },
    "tinyllama-1.1b-chat": {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
        "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048, "vocab_size": 32000,
    },
    "llama-3.2-1b": {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072,
        "vocab_size": 128256,
    },
    "llama-3.1-8b-instruct": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, "vocab_size": 128256,
    },
    "qwen2.5-7b-instruct": {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768, "vocab_size": 152064,
        "sliding_window": 131072, "use_sliding_window": False, "max_window_layers": 28,
    },
    "qwen2.5-coder-1.5b-instruct": {
        "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 32768, "vocab_size": 151936,
        "use_sliding_window": False, "max_window_layers": 28,
    },
    "qwen3-8b": {
        "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
        "vocab_size": 151936, "sliding_window": None, "use_sliding_window": False, "max_window_layers": 36,
    },
    "mistral-7b-instruct": {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768, "vocab_size": 32768,
        "sliding_window": None,
    },
    "phi-3.5-mini": {
        "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 131072, "vocab_size": 32064,
        "sliding_window": 262144,
    },
    "phi-4-mini": {
        "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
        "num_attention_heads": 24, "num_key_value_heads": 8, "max_position_embeddings": 131072, "vocab_size": 200064,
        "sliding_window": 262144,
    },
    "phi-4": {
        "model_type": "phi3", "hidden_size": 5120, "intermediate_size": 17920, "num_hidden_layers": 40,
        "num_attention_heads": 40, "num_key_value_heads": 10, "max_position_embeddings": 16384, "vocab_size": 100352,
        "sliding_window": None,
    },
}  # fmt: skip
ARCHITECTURES["gemma-2b-it"] = ARCHITECTURES["gemma-2b"]

# Layers a schedule may pack: all of them, but in Gemma-3 every sixth.
PACKED = {name: list(range(fields["num_hidden_layers"])) for name, fields in ARCHITECTURES.items()} | {
    "gemma-3-270m": [5, 11, 17],
    "gemma-3-1b": [5, 11, 17, 23],
}


def config(name: str) -> PreTrainedConfig:
    """The model's config; token ids are those of no model."""
    return _build(dict(ARCHITECTURES[name]))


def small(name: str, **changes: object) -> PreTrainedConfig:
    """The same architecture with its head_dim, queries per KV head and kinds of layers, everything else cut."""
    whole = config(name)
    kv_heads = min(whole.num_key_value_heads, 2)
    heads = kv_heads * whole.num_attention_heads // whole.num_key_value_heads
    cut: dict[str, object] = {
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim(whole),
        "hidden_size": 8 * heads, "intermediate_size": 64, "num_hidden_layers": 2, "max_window_layers": 2,
    }  # fmt: skip
    if len(PACKED[name]) < whole.num_hidden_layers:
        cut |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}
    return _build({**ARCHITECTURES[name], **cut, **changes})


def _build(fields: dict[str, object]) -> PreTrainedConfig:
    return AutoConfig.for_model(**fields, pad_token_id=0, bos_token_id=1, eos_token_id=2)
