"""The bytes of a cache as counted, against caches that are really allocated, and the budget made of them."""

import re
from dataclasses import replace

import layer_state
import pytest
import tiny
import torch
from transformers import Lfm2Config

from tq_ao import TurboQuantCache, TurboQuantConfig
from tq_ao.cache import quantizable_layers
from tq_ao.calibration.allocation import MIB, offered, rounded_up
from tq_ao.codebook import BITS
from tq_ao.footprint import count, maps_bytes, memory_budget
from tq_ao.rotation import LayerMaps, MapSource

TOKENS, WINDOW, SINKS = 1000, 32, 4


def draw(rng, items):
    return items[int(torch.randint(len(items), (), generator=rng))]


def allocated(cache, heads=2, dim=32):
    """Bytes of all storages of a cache that is filled with zeros, on the CPU, of the maps its layers read, and of what
    kernels would keep of those."""
    cache.early_initialization(1, heads, dim, torch.bfloat16, torch.device("cpu"))
    tensors = [t for layer in cache.layers for t in vars(layer).values() if isinstance(t, torch.Tensor)]
    tensors += [t for layer in cache.packed_layers() for t in layer_state.with_operands(layer.layer_maps)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def some_maps(rng, feedback):
    """As a checkpoint has them: no two tensors are one."""
    maps = layer_state.maps(2, 32, rng, feedback=feedback)
    return LayerMaps(**{name: tensor.clone() for name, tensor in maps.tensors().items()})


@pytest.mark.parametrize(("kind", "mib"), [("llama", 0.6), ("gemma3", 0.45)])
def test_counted_is_what_is_allocated_and_what_the_budget_says(kind, mib, rng):
    """Some layers with feedback, some exact; gemma3 has layers beside that slide."""
    config = tiny.config(kind, num_hidden_layers=6)
    layers = quantizable_layers(config)
    memory = memory_budget(config, mib, TOKENS, window=WINDOW, sinks=SINKS, calibrated=False)
    assert memory.packed == (TOKENS - SINKS - WINDOW) // 32 * 32 and bool(memory.beside) == (kind == "gemma3")
    for _ in range(5):
        schedule = {i: draw(rng, offered(BITS, exact=True)) for i in layers}
        maps = {i: some_maps(rng, draw(rng, [True, False])) for i in layers}
        quantization = TurboQuantConfig.from_schedule(schedule, window=WINDOW, sinks=SINKS)
        caches = [TurboQuantCache(config, quantization, MapSource("hadamard", 0, maps), TOKENS) for _ in range(2)]
        parts = count(caches[0], config)
        assert sum(sum(part.values()) for part in parts) == allocated(caches[1])
        sizes = replace(memory, maps={i: maps_bytes(m) for i, m in maps.items()})
        assert sizes.needed(sizes.total(schedule)) * MIB == sum(sum(part.values()) for part in parts)
        assert all((parts[i]["maps"] == parts[i]["codes"] == 0) == (schedule[i] == (16, 16)) for i in layers)


def says(config, mib, tokens=TOKENS, calibrated=True):
    with pytest.raises(ValueError, match="^expected ") as caught:
        memory_budget(config, mib, tokens, window=WINDOW, sinks=SINKS, calibrated=calibrated)
    return str(caught.value)


def test_budgets_that_cannot_be_or_leave_nothing_to_do():
    config = tiny.config("llama")
    least, most = (float(re.search(r"(?:at least|below) ([\d.]+) MiB", says(config, mib))[1]) for mib in (0.01, 100))
    assert memory_budget(config, least, TOKENS, window=WINDOW, sinks=SINKS, calibrated=True).mib == least
    assert "at least" in says(config, least - 0.001)
    assert "the exact cache for 1000 tokens fits" in says(config, most + 0.001)
    assert "at least" in says(config, least - 0.03, calibrated=False), "without feedback a little less will do"
    memory_budget(config, least - 0.01, TOKENS, window=WINDOW, sinks=SINKS, calibrated=False)
    assert "a context that packing makes smaller, got 128 tokens" in says(config, 1.0, tokens=128)


def test_the_least_memory_holds_feedback_in_every_layer(rng):
    config, maps = tiny.config("llama"), {i: some_maps(rng, feedback=True) for i in range(3)}
    narrowest = TurboQuantConfig(bits=BITS[0], window=WINDOW, sinks=SINKS)
    parts = count(TurboQuantCache(config, narrowest, MapSource("hadamard", 0, maps), TOKENS), config)
    held = sum(sum(part.values()) for part in parts) / MIB
    assert f"at least {rounded_up(held)} MiB" in says(config, 0.01)


def test_a_size_not_known_beforehand_is_refused():
    config = Lfm2Config(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2, full_attn_idxs=[1]
    )
    assert "got LinearAttentionLayer at [0, 2]; set the size by bits" in says(config, 1.0)
