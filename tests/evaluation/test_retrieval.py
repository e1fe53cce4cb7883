"""Questions are asked of a real packed cache, by what is greedy decoding as long as it is right."""

import random

import pytest
import tiny
import torch
from characters import CharacterTokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from tq_ao import hf, reference
from tq_ao.cache import TurboQuantCache
from tq_ao.cache_layer import RING_SLACK
from tq_ao.config import TurboQuantConfig
from tq_ao.errors import TextError
from tq_ao.evaluation import retrieval as module
from tq_ao.evaluation.haystack import Prompt, Question, prompts
from tq_ao.evaluation.retrieval import (
    Contender,
    Trial,
    ask,
    bytes_per_token,
    check_packed,
    in_bfloat16,
    packed,
    packed_tokens,
    prefill,
    retrieval,
    summary,
)
from tq_ao.evaluation.retrieval_run import contenders, measure
from tq_ao.text import articles, split_articles, windows


def attached(kind="llama", **fields):
    model = tiny.model(kind)
    return hf.attach(model, TurboQuantConfig(**{"bits": 3, "window": 16, "sinks": 4} | fields))


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_packing_an_exact_prefill_is_prefilling_a_packed_cache(kind, rng):
    model = attached(kind)
    ids, question = torch.randint(2, 97, (1, 130), generator=rng), torch.randint(2, 97, (1, 7), generator=rng)
    want, got = model.turboquant.make_cache(), packed(model.turboquant.make_cache(), prefill(model, ids))
    with torch.no_grad():
        model(ids, **{tiny.CACHE: want})
        for a, b in zip(want.packed_layers(), got.packed_layers(), strict=True):
            for x, y in zip(a.buffers(), b.buffers(), strict=True):
                torch.testing.assert_close(x, y)
        torch.testing.assert_close(
            model(question, **{tiny.CACHE: want}).logits, model(question, **{tiny.CACHE: got}).logits
        )


def test_prefill_in_pieces_is_exact(rng, monkeypatch):
    model, ids = attached("gemma3"), torch.randint(2, 97, (1, 90), generator=rng)
    whole = prefill(model, ids)
    monkeypatch.setattr(module, "CHUNK", 32)
    pieces = prefill(model, ids)
    assert type(pieces) is DynamicCache
    for a, b in zip(whole.layers, pieces.layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys, atol=1e-3, rtol=1e-3)


def test_right_means_greedy_decoding_gives_the_answer(rng):
    model = attached()
    ids, question = torch.randint(2, 97, (1, 120), generator=rng), torch.randint(2, 97, (1, 9), generator=rng)
    cache = packed(model.turboquant.make_cache(), prefill(model, ids))
    used = packed(model.turboquant.make_cache(), prefill(model, ids))
    whole = torch.cat([ids, question], 1)
    out = model.generate(
        whole, attention_mask=torch.ones_like(whole), **{tiny.CACHE: used}, max_new_tokens=6, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    answer = out.sequences[0, whole.shape[1] :]
    log_p = torch.log_softmax(torch.cat(out.logits).float(), -1).gather(1, answer[:, None]).sum().item()
    right, found = ask(model, cache, Question(question, answer, (0, 1), 0.0))
    assert right
    assert found == pytest.approx(log_p, abs=1e-3)
    for at in range(len(answer)):
        wrong = answer.clone()
        wrong[at] = wrong[at] % 90 + 3  # never itself
        assert not ask(model, cache, Question(question, wrong, (0, 1), 0.0))[0]
    assert cache.get_seq_length() == 120
    assert ask(model, cache, Question(question, answer, (0, 1), 0.0)) == (right, found)


@pytest.mark.parametrize("bits", [1, 3, 4])
def test_storage_is_counted_from_the_tensors(bits, rng):
    model, tokens = attached(bits=bits), int(torch.randint(60, 200, (), generator=rng))
    exact = prefill(model, torch.randint(2, 97, (1, tokens), generator=rng))
    cache = packed(model.turboquant.make_cache(), exact)
    held = packed_tokens(cache)
    assert held == reference.packed_tokens(tokens, 4, 16, 16 + RING_SLACK) > 0
    assert packed_tokens(exact) == 0
    assert bytes_per_token(exact) == 3 * 2 * 2 * 32 * 2  # layers, K and V, heads, head_dim, bfloat16
    assert bytes_per_token(cache) == 3 * 2 * 2 * (32 * bits / 8 + 2)
    span = (4 + held - 1, 4 + held)
    fact = Prompt("task", torch.zeros(1, tokens), [Question(torch.zeros(1, 1), torch.zeros(1), span, 0.5)])
    check_packed(cache, fact, "ours")
    for first, last in ((3, 5), (4 + held - 1, 4 + held + 1)):
        fact.questions[0] = Question(torch.zeros(1, 1), torch.zeros(1), (first, last), 0.5)
        with pytest.raises(RuntimeError, match="packed"):
            check_packed(cache, fact, "ours")


def test_nothing_packed_is_an_error(rng):
    model = attached()
    cache = packed(model.turboquant.make_cache(), prefill(model, torch.randint(2, 97, (1, 20), generator=rng)))
    with pytest.raises(RuntimeError, match="packed"):
        check_packed(cache, Prompt("task", torch.zeros(1, 20), []), "ours")


def test_rows_of_every_task_and_cache(seed, rng):
    model, draw = attached(), random.Random(seed)
    tokenizer = CharacterTokenizer()
    filler = torch.tensor([tokenizer("".join(draw.choices("abc d.", k=900)))["input_ids"] for _ in range(3)])
    lines = []
    rows = retrieval(model, contenders(model), prompts(tokenizer, filler, 4, 868, seed, pairs=3), lines.append)
    assert len(lines) == 5
    assert [(r["task"], r["method"], r["code_bits"]) for r in rows] == [
        (task, *cache)
        for task in ("key-value", "passkey")
        for cache in (("exact", 16), ("exact, in bfloat16", 16), *(("uniform, plain", bits) for bits in (3, 2, 1)))
    ]
    for row in rows:
        assert (row["tokens"], row["prompts"]) == (900, 2 if row["task"] == "key-value" else 3)
        assert row["questions"] == sum(n for _, n in row["by_depth"].values()) == (6 if row["prompts"] == 2 else 3)
        assert row["packed_tokens"] == (0 if row["code_bits"] == 16 else 864)
        assert row["lost"] - row["gained"] == rows[0 if row["task"] == "key-value" else 5]["right"] - row["right"]
        assert (row["change"] == 0) == (row["method"] == "exact")


def test_a_calibrated_model_is_asked_with_its_own_schedule(rng):
    model = tiny.model()
    maps = {i: TurboQuantCache(model.config).layers[i].maps(i, 2, 32, torch.device("cpu")) for i in range(3)}
    quantization = TurboQuantConfig.from_schedule({0: (4, 2), 1: (3, 3), 2: (2, 2)}, window=40, sinks=6)
    asked = contenders(hf.attach(model, quantization, maps))
    assert (asked[2].method, asked[2].code_bits) == ("schedule, calibrated", pytest.approx(16 / 6))
    for contender in asked[2:]:
        cache = contender.make()
        assert (cache.quantization.window, cache.quantization.sinks) == (40, 6)
    assert asked[2].make().layers[0].scheme.v_bits == 2
    assert not asked[3].make().layers[0].maps.calibrated


def test_errors_are_over_prompts():
    ours = [Trial(0, 0.0, True, -1.0), Trial(0, 1.0, False, -3.0), Trial(1, 0.0, True, -4.0), Trial(1, 1.0, True, -6.0)]
    base = [Trial(t.prompt, t.depth, True, -1.0) for t in ours]
    found = summary(ours, base)
    assert found["log_probability"] == -3.5
    assert found["log_probability_stderr"] == pytest.approx(1.5)  # of the prompts' means -2 and -5
    assert (found["change"], found["right"], found["prompts"], found["questions"]) == (-2.5, 3, 2, 4)
    assert (found["lost"], found["gained"]) == (1, 0)
    assert (summary(base, ours)["lost"], summary(base, ours)["gained"]) == (0, 1)
    assert found["by_depth"] == {"0.00": [2, 2], "1.00": [1, 2]}


def test_a_cache_in_bfloat16_has_lost_what_bfloat16_has_not(rng):
    exact = prefill(attached("gemma3"), torch.randint(2, 97, (1, 50), generator=rng))
    for a, b in zip(exact.layers, in_bfloat16(exact).layers, strict=True):
        assert b.keys.dtype == torch.float32
        assert torch.equal(b.keys, a.keys.bfloat16().float()) and torch.equal(b.values, a.values.bfloat16().float())
        assert not torch.equal(b.keys, a.keys)


def test_a_real_model_finds_the_fact_in_four_bits_and_not_in_one(smollm2, seed):
    """1 bit is the control: were it as good, something else than the codes would have been read."""
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    hf.attach(model, TurboQuantConfig(window=32))
    filler = windows(tokenizer, split_articles(articles("enwiki"), seed)[1], 448, 3)
    asked = [Contender("exact", 16)]
    for bits in (4, 1):
        asked.append(
            Contender(
                "uniform", bits, lambda b=bits: TurboQuantCache(model.config, TurboQuantConfig(bits=b, window=32))
            )
        )
    made = [p for p in prompts(tokenizer, filler, 4, 4 + 384, seed) if p.task == "passkey"]
    exact, four, one = retrieval(model, asked, made)
    assert exact["right"] >= 2 and four["right"] >= 2
    assert one["right"] <= 2  # of 3: in so short a text signs alone are enough for one question in twenty
    assert four["change"] > -1.5 and one["change"] < -4


def test_prompts_longer_than_the_model_reads_are_refused(smollm2):
    with pytest.raises(TextError, match="prompts of at most 8192 tokens, what .* can read, got 9000"):
        measure(str(smollm2), [1024, 9000], [1, 1])
