"""torchao's quantize_ with TurboQuantKVCacheConfig."""

import pytest
import tiny
import torch
from torchao.core.config import config_from_dict, config_to_dict
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import LlamaConfig, LlamaForCausalLM

from tq_ao import TurboQuantKVCacheConfig
from tq_ao.cache import TurboQuantLayer
from tq_ao.config import LayerScheme
from tq_ao.quantize import attach_recorded, is_attention, whole_model


@pytest.fixture
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=64,
        num_hidden_layers=3,
        vocab_size=64,
    )
    return LlamaForCausalLM(config).eval()


def test_config_survives_torchao_serialization() -> None:
    config = TurboQuantKVCacheConfig(k_bits=4, v_bits=2, window=64, sinks=0, rotation="dense", seed=7)
    data = config_to_dict(config)
    assert data["_type"] == "TurboQuantKVCacheConfig"
    assert data["_version"] == 1
    assert config_from_dict(data) == config


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"k_bits": 5}, "expected k_bits in"),
        ({"k_bits": 16}, "expected both or neither of k_bits, v_bits to be 16"),
        ({"window": -1}, "expected window to be an integer >= 0"),
        ({"rotation": "none"}, "expected rotation 'hadamard' or 'dense'"),
        ({"version": 2}, "expected version 1 of this config, got 2; upgrade tq_ao"),
    ],
)
def test_config_is_validated(fields: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        TurboQuantKVCacheConfig(**fields)


def test_whole_model_is_attached_and_composes_with_weights(model: LlamaForCausalLM) -> None:
    quantize_(model, Int8WeightOnlyConfig())
    quantize_(model, TurboQuantKVCacheConfig(k_bits=4, v_bits=2, sinks=1), filter_fn=whole_model)
    assert model.turboquant.quantization.layers == {i: LayerScheme(4, 2) for i in range(3)}
    assert type(model.model.layers[0].self_attn.k_proj.weight).__name__ == "Int8Tensor"
    tokens = torch.randint(0, 64, (1, 9))
    out = model.generate(tokens, min_new_tokens=3, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert out.sequences.shape == (1, 12)
    assert all(isinstance(layer, TurboQuantLayer) for layer in out[tiny.CACHE].layers)


def test_attention_modules_keep_the_config_until_attached(model: LlamaForCausalLM) -> None:
    config = TurboQuantKVCacheConfig(k_bits=3, v_bits=2)
    quantize_(model, config, filter_fn=is_attention)
    last = TurboQuantKVCacheConfig(k_bits=8, v_bits=4)
    quantize_(model, last, filter_fn=lambda m, fqn: fqn.endswith("layers.2.self_attn"))
    assert [layer.self_attn.turboquant for layer in model.model.layers] == [config, config, last]
    for layer, (k_bits, v_bits) in zip(model.model.layers, [(3, 2), (3, 2), (8, 4)], strict=True):
        assert repr(layer).count(f"kv_cache=turboquant(k_bits={k_bits}, v_bits={v_bits})") == 1
    assert attach_recorded(model) is model
    assert model.turboquant.quantization.layers == {0: LayerScheme(3, 2), 1: LayerScheme(3, 2), 2: LayerScheme(8, 4)}


def test_layers_without_a_record_stay_exact(model: LlamaForCausalLM) -> None:
    quantize_(model, TurboQuantKVCacheConfig(), filter_fn=lambda m, fqn: fqn.endswith("layers.1.self_attn"))
    attach_recorded(model)
    packed = [isinstance(layer, TurboQuantLayer) for layer in model.turboquant.make_cache().layers]
    assert packed == [False, True, False]


def test_errors_say_what_to_do(model: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"got Linear; pass filter_fn=tq_ao.quantize.whole_model or"):
        quantize_(model, TurboQuantKVCacheConfig())
    with pytest.raises(ValueError, match="no attention module carries a TurboQuantKVCacheConfig"):
        attach_recorded(model)
    quantize_(model, TurboQuantKVCacheConfig(), filter_fn=is_attention)
    quantize_(model, TurboQuantKVCacheConfig(window=64), filter_fn=lambda m, fqn: fqn.endswith("layers.2.self_attn"))
    with pytest.raises(ValueError, match="expected one .window, sinks, rotation, seed. in all layers"):
        attach_recorded(model)
