"""What is captured is what the model computes, and the statistics are those of a naive double loop."""

import math

import pytest
import tiny
import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, GPT2Config, GPTBigCodeConfig, GPTNeoXConfig, OPTConfig, PhiConfig

from tq_ao.calibration.calibrate import calibrate, collect
from tq_ao.calibration.statistics import LayerStatistics, accumulate, pair_weights
from tq_ao.evaluation.setup import plain_maps
from tq_ao.measure.capture import AttentionCall, exact, intercept, trace, window_start


@pytest.fixture
def ids(rng):
    return torch.randint(2, 97, (2, 60), generator=rng)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "gemma3", "gpt_oss"])
@torch.no_grad()
def test_exact_handler_changes_nothing(kind, ids):
    model = tiny.model(kind)
    if kind == "gemma2":
        model.set_attn_implementation("eager")  # before 5.21 it is SDPA, which drops the soft-capping
    want, before = model(ids).logits, model.config._attn_implementation
    seen = []

    def handler(call):
        seen.append((call.layer, tuple(call.q.shape), tuple(call.k.shape), call.sliding))
        return exact(call)

    with intercept(model, handler):
        got = model(ids, use_cache=False).logits
    torch.testing.assert_close(got, want, atol=2e-3, rtol=1e-3)
    assert [s[:3] for s in seen] == [(i, (2, 4, 60, 32), (2, 2, 60, 32)) for i in range(model.config.num_hidden_layers)]
    assert model.config._attn_implementation == before
    if kind == "gemma3":
        assert [s[3] for s in seen] == [24, None, 24, None]


@pytest.mark.parametrize("sliding", [1, 9, 10, 11])
def test_a_sliding_query_sees_as_many_keys_as_it_says(sliding, rng):
    q, k, v = torch.randn(3, 1, 2, 10, 8, generator=rng)
    age = torch.arange(10)[:, None] - torch.arange(10)
    seen = (q @ k.mT).masked_fill((age < 0) | (age >= sliding), -torch.inf)
    torch.testing.assert_close(exact(AttentionCall(0, q, k, v, 1.0, sliding=sliding)), torch.softmax(seen, -1) @ v)


def test_windows_are_spread_over_the_context():
    starts = [window_start(n, 1000, 9000) for n in range(12)]
    assert starts[0] == 0 and min(starts) >= 0 and max(starts) <= 8000
    assert sum(s < 2000 for s in starts) >= 5 and sum(s > 4000 for s in starts) >= 3
    assert {window_start(n, 1000, context) for n in range(9) for context in (0, 1000)} == {0}


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_window_elsewhere_computes_the_same_from_other_keys(kind, ids):
    """RoPE: scores depend on differences of positions only, keys on positions."""
    model = tiny.model(kind)
    near, far = (trace(model, ids, gradient=False, start=start) for start in (0, 777))
    for layer, t in near.items():
        torch.testing.assert_close(far[layer].out, t.out, atol=2e-3, rtol=1e-2)
        assert (far[layer].call.k - t.call.k).norm() > 0.1 * t.call.k.norm()
        torch.testing.assert_close(far[layer].call.v, t.call.v, atol=2e-3, rtol=1e-2)


def test_gradient_is_that_of_the_sampled_log_likelihood(ids):
    model = tiny.model()
    traces = trace(model, ids, gradient=True, generator=torch.Generator().manual_seed(5), skip=8)
    bump = torch.randn_like(traces[1].out)
    step = 1e-3

    def log_likelihood(sign):
        with intercept(model, lambda c: exact(c) + (sign * step * bump if c.layer == 1 else 0)), torch.no_grad():
            return torch.log_softmax(model(ids, use_cache=False).logits[:, 8:].double(), -1)

    uniform = torch.rand(2, 52, generator=torch.Generator().manual_seed(5))
    cdf = log_likelihood(0).float().exp().cumsum(-1)
    labels = torch.searchsorted(cdf, (uniform * cdf[..., -1])[..., None]).clamp_max(96)
    slope = (log_likelihood(1) - log_likelihood(-1)).gather(-1, labels).sum().item() / (2 * step)
    assert slope == pytest.approx((traces[1].grad * bump).sum().item(), rel=0.05, abs=0.05)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("kind", "layer"), [("llama", 1), ("gemma3", 0), ("gemma2", 1)])
def test_pair_weights_equal_a_double_loop(kind, layer, ids):
    window, sinks = 10, 3
    t = trace(tiny.model(kind), ids[:1], gradient=True, generator=torch.Generator().manual_seed(1))[layer]
    found = pair_weights(t, window, sinks)
    c, groups, n = t.call, 2, 60
    qa, ka, va = torch.zeros(4, n), torch.zeros(2, n), torch.zeros(2, n)
    qf, kf = torch.zeros(4, n), torch.zeros(2, n)
    for head in range(4):
        kv = head // groups
        for i in range(n):
            keys = [j for j in range(i + 1) if c.sliding is None or i - j < c.sliding]
            s = [float(c.q[0, head, i].double() @ c.k[0, kv, j].double()) * c.scaling for j in keys]
            capped = [c.softcap * math.tanh(x / c.softcap) if c.softcap else x for x in s]
            p = torch.softmax(torch.tensor(capped, dtype=torch.float64), 0).tolist()
            o = sum(w * c.v[0, kv, j].double() for w, j in zip(p, keys, strict=True))
            g = t.grad[0, head, i].double()
            for w, j, x in zip(p, keys, capped, strict=True):
                if i - j < window or j < sinks:
                    continue
                slope = 1 - (x / c.softcap) ** 2 if c.softcap else 1.0
                effect = (w * float(g @ (c.v[0, kv, j].double() - o)) * slope) ** 2
                qa[head, i] += w * (1 - w)
                ka[kv, j] += w * (1 - w)
                va[kv, j] += w
                qf[head, i] += effect
                kf[kv, j] += effect
    close = {"rtol": 2e-3, "atol": 1e-5}
    torch.testing.assert_close(found.q_attention[0].flatten(0, 1), qa, **close)
    torch.testing.assert_close(found.k_attention[0], ka, **close)
    torch.testing.assert_close(found.v_attention[0], va, **close)
    scale = kf.max()
    torch.testing.assert_close(found.q_fisher[0].flatten(0, 1) / scale, qf / scale, **close)
    torch.testing.assert_close(found.k_fisher[0] / scale, kf / scale, **close)


def test_statistics_leave_out_sinks_and_recent_tokens(ids):
    t = trace(tiny.model(), ids, gradient=False)[0]
    t.call.v[:, :, :4] = 1e4
    t.call.v[:, :, -10:] = -1e4
    statistics = LayerStatistics()
    accumulate(statistics, t, window=10, sinks=4)
    assert {w for _, w in statistics.moments} == {"tokens", "attention"}
    for weighting in ("tokens", "attention"):
        assert statistics.moments["v", weighting].mean().abs().max() < 100
    assert (statistics.moments["k", "tokens"].weight <= 2 * 46).all()
    assert (statistics.moments["k", "tokens"].weight > 2 * 30).all()


SMALL = {"vocab_size": 97, "hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2, "pad_token_id": 0}
GPT2 = {"vocab_size": 97, "n_embd": 128, "n_head": 4, "n_layer": 2, "bos_token_id": 1, "eos_token_id": 2}
OTHERS = {
    "phi": (PhiConfig(**SMALL, num_key_value_heads=2, intermediate_size=96), "self_attn.dense"),
    "gpt_neox": (GPTNeoXConfig(**SMALL, intermediate_size=96), "attention.dense"),
    "opt": (OPTConfig(**SMALL, ffn_dim=96, word_embed_proj_dim=128), "self_attn.out_proj"),
    "gpt2": (GPT2Config(**GPT2), "attn.c_proj"),
    "gpt_bigcode": (GPTBigCodeConfig(**GPT2), "attn.c_proj"),
    "llama": (tiny.config("llama"), "self_attn.o_proj"),
}


@pytest.mark.parametrize("kind", OTHERS)
@torch.no_grad()
def test_output_projections_are_found_by_any_of_their_names(kind, ids):
    config, name = OTHERS[kind]
    model = AutoModelForCausalLM.from_config(config).eval()
    (projection,) = (module for path, module in model.named_modules() if path.endswith(f"1.{name}"))
    heads = model.config.num_key_value_heads if hasattr(model.config, "num_key_value_heads") else 4
    check_readout(model, projection, heads, ids)


@torch.no_grad()
def test_a_quantised_output_projection_is_read_as_it_multiplies(ids):
    model = tiny.model()
    quantize_(model, Int8WeightOnlyConfig(version=2))
    check_readout(model, model.model.layers[1].self_attn.o_proj, 2, ids)


def check_readout(model, projection, heads, ids):
    """What is collected of layer 1, against what its projection makes of unit vectors."""
    w = (projection(torch.eye(128)) - projection(torch.zeros(128))).double()  # [Hq * D, hidden]
    rows = w.view(heads, -1, 32, w.shape[-1])  # [H, G, D, hidden]
    found = collect(model, ids[:1], [1], window=10, sinks=2, seed=0, gradient=False)[1].readout
    torch.testing.assert_close(found, (rows @ rows.mT).sum(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("hidden", [False, True])
def test_without_an_output_projection_no_variant_reads_through_it(hidden, rng):
    model = AutoModelForCausalLM.from_config(OTHERS["phi"][0]).eval()
    if hidden:
        attention = model.model.layers[1].self_attn
        attention.dense = torch.nn.Sequential(attention.dense)
    windows = torch.randint(2, 97, (3, 100), generator=rng)
    result = calibrate(model, windows, plain_maps(model, [0, 1]), bits=3, window=16, sinks=2, maps="auto")
    scored = [{name.split("/")[1] for name in c.scores if name.startswith("value/attention")} for c in result.choices]
    both = {"attention-centred", "attention-feedback"}
    assert scored == [both, set() if hidden else both]
    assert all("key/attention-centred/3" in c.scores and "value/fisher-centred/3" in c.scores for c in result.choices)
