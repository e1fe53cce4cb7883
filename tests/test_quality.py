"""Quality on a real model through the real cache, SmolLM2-135M in float32 on held-out Wikipedia articles."""

from dataclasses import replace

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tq_ao import TurboQuantCache, TurboQuantConfig, hf, quantize_kv_
from tq_ao.evaluation.decode_kl import evaluate_caches, prove_packed
from tq_ao.rotation import MapSource, rotation_maps
from tq_ao.text import articles, split_articles, windows


@pytest.fixture(scope="module")
def measured(smollm2):
    """Metrics by cache: uniform 1-4 bits, and 3 bits with the queries rotated by another layer's rotation."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    quantize_kv_(model)
    _, held_out = split_articles(articles("enwiki"), seed=0)
    text = windows(tokenizer, held_out, 2048, 1)
    right = {i: rotation_maps("hadamard", 3, 64, i) for i in range(30)}
    wrong = MapSource("hadamard", 0, {i: replace(m, query=right[(i + 1) % 30].query) for i, m in right.items()})
    config = model.config
    makers = {bits: lambda bits=bits: TurboQuantCache(config, TurboQuantConfig(bits=bits)) for bits in (1, 2, 3, 4)}
    makers["wrong rotation"] = lambda: TurboQuantCache(config, TurboQuantConfig(bits=3), wrong)
    return evaluate_caches(model, text, makers)


@pytest.mark.parametrize(("bits", "limit"), [(4, 0.0035), (3, 0.013), (2, 0.09)])
def test_uniform_kl(measured, bits, limit):
    assert 0.0005 < measured[bits].kl <= limit, measured[bits]


def test_3_bits_cost_about_one_percent_of_perplexity(measured):
    result = measured[3]
    assert abs(result.ppl_ratio - 1) <= 0.01 + 2 * result.ppl_ratio_stderr, result


def test_one_bit_and_a_wrong_rotation_break_it(measured):
    """So the numbers above are those of the cache that is read."""
    assert measured[1].kl > 10 * measured[3].kl
    assert measured["wrong rotation"].kl > 20 * measured[3].kl


def test_a_cache_with_nothing_packed_is_no_measurement(smollm2):
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    hf.attach(model, TurboQuantConfig())
    cache = model.turboquant.make_cache()
    with torch.no_grad():
        model(torch.arange(100)[None], **{tiny.CACHE: cache})
    with pytest.raises(RuntimeError, match="a layer without"):
        prove_packed(cache)
