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
def model_and_text(smollm2):
    """The model, and int64 [1, 2048] of held-out text."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    _, held_out = split_articles(articles("enwiki"), seed=0)
    return quantize_kv_(model), windows(tokenizer, held_out, 2048, 1)


def uniform(model, bits, maps=None):
    return lambda: TurboQuantCache(model.config, TurboQuantConfig(bits=bits), maps)


@pytest.fixture(scope="module")
def measured(model_and_text):
    """Metrics by bits."""
    model, text = model_and_text
    return evaluate_caches(model, text, {bits: uniform(model, bits) for bits in (2, 3, 4)})


@pytest.mark.parametrize(("bits", "limit"), [(4, 0.0035), (3, 0.013), (2, 0.09)])
def test_uniform_kl(measured, bits, limit):
    assert 0.0005 < measured[bits].kl <= limit, measured[bits]


def test_3_bits_cost_about_one_percent_of_perplexity(measured):
    result = measured[3]
    assert abs(result.ppl_ratio - 1) <= 0.01 + 2 * result.ppl_ratio_stderr, result


def test_one_bit_and_a_wrong_rotation_break_it(model_and_text):
    """So the numbers above are those of the cache that is read."""
    model, text = model_and_text
    right = {i: rotation_maps("hadamard", 3, 64, i) for i in range(30)}
    wrong = MapSource("hadamard", 0, {i: replace(m, query=right[(i + 1) % 30].query) for i, m in right.items()})
    caches = {"right": uniform(model, 3), "1 bit": uniform(model, 1), "wrong rotation": uniform(model, 3, wrong)}
    kl = {name: metrics.kl for name, metrics in evaluate_caches(model, text[:, :768], caches).items()}
    assert kl["1 bit"] > 10 * kl["right"], kl
    assert kl["wrong rotation"] > 20 * kl["right"], kl


def test_a_cache_with_nothing_packed_is_no_measurement(smollm2):
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    hf.attach(model, TurboQuantConfig())
    cache = model.turboquant.make_cache()
    with torch.no_grad():
        model(torch.arange(100)[None], **{tiny.CACHE: cache})
    with pytest.raises(RuntimeError, match="a layer without"):
        prove_packed(cache)
