"""Attention over TurboQuantTensors: packed_attention and F.scaled_dot_product_attention."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from packed_layer import PackedLayer

from tq_ao.ops import IMPLS
from tq_ao.tensor import TurboQuantTensor, packed_attention


def randn(rng: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=rng)


def oracle(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Textbook attention in float64; visible: bool, broadcastable to [B, Hq, q_len, S]."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    s = q @ k.mT * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~visible, -torch.inf)
    if sink_logits is not None:
        s = torch.cat([s, sink_logits.double().view(1, -1, 1, 1).expand(*s.shape[:3], 1)], -1)
    return s.softmax(-1)[..., : k.shape[2]] @ v


def assert_close(out: torch.Tensor, want: torch.Tensor) -> None:
    """Float32 arithmetic over a few hundred keys of unit variance."""
    assert out.shape == want.shape
    torch.testing.assert_close(out.double(), want, rtol=0, atol=2e-5)


@pytest.fixture
def pair(rng: torch.Generator) -> tuple[TurboQuantTensor, TurboQuantTensor]:
    k, v = randn(rng, 2, 2, 100, 64), randn(rng, 2, 2, 100, 64)
    return TurboQuantTensor.from_hp(k, 3, "key"), TurboQuantTensor.from_hp(v, 4, "value", seed=1)


@pytest.fixture
def layer(rng: torch.Generator) -> PackedLayer:
    layer = PackedLayer(start=(0, 5))
    layer.append(randn(rng, 2, 2, 150, 64), randn(rng, 2, 2, 150, 64))
    return layer


@pytest.fixture
def seen(layer: PackedLayer) -> torch.Tensor:
    """Which positions of `layer` hold a token, [B, 1, 1, S]."""
    position = torch.arange(layer.max_len)
    return ((position >= layer.start[:, None]) & (position < layer.length))[:, None, None]


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("q_len", [1, 5])
@pytest.mark.parametrize("group", [1, 3])
def test_sdpa_over_a_standalone_pair(
    rng: torch.Generator, pair: tuple[TurboQuantTensor, TurboQuantTensor], group: int, q_len: int, scale: float | None
) -> None:
    k, v = pair
    q = randn(rng, 2, 2 * group, q_len, 64)
    out = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=group > 1)
    dense = k.dequantize(torch.float64), v.dequantize(torch.float64)
    assert_close(out, oracle(q, *dense, torch.tensor(True), scale or 64**-0.5))


def test_sdpa_accepts_a_batch_row_and_bfloat16(
    rng: torch.Generator, pair: tuple[TurboQuantTensor, TurboQuantTensor]
) -> None:
    k, v = (t[1].unsqueeze(0)[:, :, 32:].bfloat16() for t in pair)
    q = randn(rng, 1, 2, 1, 64).bfloat16()
    out = F.scaled_dot_product_attention(query=q, key=k, value=v)
    assert out.dtype == torch.bfloat16
    dense = k.dequantize(torch.float64), v.dequantize(torch.float64)
    want = oracle(q, *dense, torch.tensor(True), 0.125)
    torch.testing.assert_close(out.double(), want, rtol=2**-7, atol=2**-9)


def test_sdpa_over_a_cache(rng: torch.Generator, layer: PackedLayer, seen: torch.Tensor) -> None:
    k, v = layer.wrap()
    for q_len in (1, 3):
        q = randn(rng, 2, 4, q_len, 64)
        want = oracle(q, k.dequantize(torch.float64), v.dequantize(torch.float64), seen, 0.125)
        assert_close(F.scaled_dot_product_attention(q, k, v, enable_gqa=True), want)


def test_sdpa_extends_a_cache_causally(rng: torch.Generator, layer: PackedLayer) -> None:
    new = randn(rng, 2, 2, 7, 64), randn(rng, 2, 2, 7, 64)
    k, v = layer.wrap(*new)
    q = randn(rng, 2, 4, 7, 64)
    position, query = torch.arange(layer.max_len), 150 + torch.arange(7)[:, None]
    visible = (position >= layer.start[:, None, None]) & (position <= query)
    want = oracle(q, k.dequantize(torch.float64), v.dequantize(torch.float64), visible[:, None], 0.125)
    assert_close(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), want)
    with pytest.raises(ValueError, match="expected is_causal=True for the new tokens"):
        F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@pytest.mark.parametrize("extend", [False, True])
def test_packed_attention_with_softcap_and_sink_logits(
    rng: torch.Generator, layer: PackedLayer, seen: torch.Tensor, extend: bool
) -> None:
    new = (randn(rng, 2, 2, 1, 64), randn(rng, 2, 2, 1, 64)) if extend else (None, None)
    k, v = layer.wrap(*new)
    q, sink_logits = 3 * randn(rng, 2, 4, 1, 64), randn(rng, 4)
    visible = seen | (torch.arange(layer.max_len) == 150) if extend else seen
    dense = k.dequantize(torch.float64), v.dequantize(torch.float64)
    out = packed_attention(q, k, v, 0.2, softcap=2.0, sink_logits=sink_logits, impl="reference")
    assert_close(out, oracle(q, *dense, visible, 0.2, 2.0, sink_logits))


def test_attention_reads_codes_and_never_dequantizes(
    rng: torch.Generator, layer: PackedLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("attention made the cache dense")

    monkeypatch.setattr(TurboQuantTensor, "dequantize", refuse)
    new = randn(rng, 2, 2, 4, 64), randn(rng, 2, 2, 4, 64)
    before = packed_attention(randn(rng, 2, 4, 4, 64), *layer.wrap(*new), 0.125)
    q = randn(rng, 2, 4, 1, 64)
    before = F.scaled_dot_product_attention(q, *layer.wrap(), enable_gqa=True)
    layer.k_codes.bitwise_not_()
    after = F.scaled_dot_product_attention(q, *layer.wrap(), enable_gqa=True)
    assert (after - before).abs().max() > 1e-3


Case = Callable[[torch.Tensor, TurboQuantTensor, TurboQuantTensor], object]
SDPA_ERRORS: list[tuple[Case, str]] = [
    (
        lambda q, k, v: F.scaled_dot_product_attention(q, v, k),
        "expected the key argument to have role 'key', got 'value'",
    ),
    (lambda q, k, v: F.scaled_dot_product_attention(q, k, k), "expected the value argument to have role 'value'"),
    (lambda q, k, v: F.scaled_dot_product_attention(q, k, v.dequantize()), "expected value to be a TurboQuantTensor"),
    (lambda q, k, v: F.scaled_dot_product_attention(q, k.dequantize(), v), "expected key to be a TurboQuantTensor"),
    (lambda q, k, v: F.scaled_dot_product_attention(k, k, v), "expected a dense query"),
    (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(1, 100, dtype=torch.bool)),
        r"expected attn_mask=None with packed keys, got torch.bool \(1, 100\); .* dequantize\(\) key and value",
    ),
    (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1), "expected dropout_p=0"),
    (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), "expected is_causal=False, got True"),
    (
        lambda q, k, v: F.scaled_dot_product_attention(q.repeat(1, 2, 1, 1), k, v),
        "expected 2 query heads, got 4; pass enable_gqa=True",
    ),
    (
        lambda q, k, v: F.scaled_dot_product_attention(torch.cat([q, q[:, :1]], 1), k, v, enable_gqa=True),
        r"expected queries \[2, a multiple of 2, q_len, 64\]",
    ),
    (
        lambda q, k, v: F.scaled_dot_product_attention(q[:, [0, 1, 0]].repeat(1, 1, 2, 1), k, v, enable_gqa=True),
        r"expected queries \[2, a multiple of 2, q_len, 64\]",
    ),
    (lambda q, k, v: F.scaled_dot_product_attention(q[:1], k, v), r"expected queries \[2,"),
    (lambda q, k, v: F.scaled_dot_product_attention(q[..., :32], k, v), r"q_len, 64\]"),
    (lambda q, k, v: F.scaled_dot_product_attention(q.half(), k, v), "expected query in the keys' dtype torch.float32"),
    (lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0]), r"use unsqueeze\(0\)"),
    (lambda q, k, v: F.scaled_dot_product_attention(q, k, v[:, :, :64]), "expected key and value of one layer"),
    (lambda q, k, v: packed_attention(q, k, v.replace(window=32), 1.0), "expected key and value of one layer"),
    (lambda q, k, v: packed_attention(q.repeat(1, 1, 2, 1), k, v, 1.0), "expected 1 queries, got 2"),
    (lambda q, k, v: packed_attention(q, k, v, 1.0, impl="fast"), f"expected impl in .*{IMPLS[-1]}.* got 'fast'"),
    (lambda q, k, v: packed_attention(q, k, v, 1.0, impl="triton"), "impl='triton' does not run on cpu; use one of"),
]


@pytest.mark.parametrize(("call", "match"), SDPA_ERRORS)
def test_errors_say_what_to_do(
    rng: torch.Generator, pair: tuple[TurboQuantTensor, TurboQuantTensor], call: Case, match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        call(randn(rng, 2, 2, 1, 64), *pair)


def test_the_number_of_queries_must_match_the_new_tokens(rng: torch.Generator, layer: PackedLayer) -> None:
    k, v = layer.wrap(randn(rng, 2, 2, 3, 64), randn(rng, 2, 2, 3, 64))
    with pytest.raises(ValueError, match="expected 3 queries, got 2"):
        packed_attention(randn(rng, 2, 4, 2, 64), k, v, 0.125)
    with pytest.raises(ValueError, match="expected key and value of one layer"):
        packed_attention(randn(rng, 2, 4, 3, 64), k, v.replace(new=None), 0.125)
