"""The torch reference: distortion of the codec, the cache's geometry, attention against a dense float64 one."""

import random

import layer_state
import pytest
import torch

from tq_ao import reference
from tq_ao.codebook import BITS, ROLES, codebook, even_levels, gaussian_mse
from tq_ao.packing import unpack
from tq_ao.rotation import LayerMaps, rotation_maps

SCALE = 0.125


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("bits", BITS)
def test_distortion_is_that_of_the_codebook(bits: int, role: str, rng: torch.Generator, seed: int) -> None:
    maps = rotation_maps("dense", 1, 128, seed)
    x = torch.randn(1, 1, 4096, 128, generator=rng) * 10 ** torch.empty(4096, 1).uniform_(-1, 1, generator=rng)
    codes, scales = reference.encode(x, maps.key, maps.key_shift, bits, role)
    back = reference.decode(codes, scales, 128, role) @ maps.query.mT
    relative = ((x - back).square().sum(-1) / x.square().sum(-1)).mean().item()
    if bits == 8:
        assert relative < 1e-4
    else:
        # 1 (at 1 bit) to 4 % (at 4) less than of normal numbers: 128 of given length have shorter tails.  It varies by
        # 0.4 % with the seed.
        theory = gaussian_mse(even_levels(bits, codebook(bits).step))
        assert 0.93 * theory < relative < 1.01 * theory


@pytest.mark.parametrize("bits", [b for b in BITS if b < 8])
def test_codes_are_the_nearest_levels_and_scales_least_squares(bits: int, rng: torch.Generator) -> None:
    y = torch.randn(300, 64, generator=rng)
    codes, scales = reference.quantize(y, bits)
    levels = codebook(bits).tensor()
    unit = y.square().mean(-1, keepdim=True).sqrt() * codebook(bits).step
    distance = ((y / unit)[..., None] - levels).abs()
    chosen = distance.gather(-1, codes.long()[..., None])[..., 0]
    assert (chosen <= distance.amin(-1) + 1e-5).all()  # half way between two levels, rounding decides
    c = levels[codes.long()].double()
    best = (y * c).sum(-1) / c.square().sum(-1)
    assert torch.allclose(scales.double(), best, rtol=2**-10)


@pytest.mark.parametrize("bits", BITS)
def test_feedback_is_what_the_docstring_says_vector_by_vector(bits: int, rng: torch.Generator) -> None:
    y = torch.randn(2, 3, 20, 64, generator=rng)
    feedback = torch.randn(3, 32, 32, generator=rng) / 6
    codes, scales = reference.quantize(y, bits, feedback)
    levels = codebook(bits).tensor().double()
    # Half way between two levels, rounding decides: of float32, and of an even dim's error to bfloat16.
    near = 1e-3 * (levels[1] - levels[0])

    def taken(numbers, codes):
        distance = (numbers[:, None] - levels).abs()
        assert (distance.gather(1, codes.long()[:, None])[:, 0] <= distance.amin(1) + near).all()
        return levels[codes.long()]

    for b in range(2):
        for h in range(3):
            for n in range(20):
                even, odd = y[b, h, n, 0::2].double(), y[b, h, n, 1::2].double()
                whole = y[b, h, n].double()
                step = whole.abs().max() if bits == 8 else whole.square().mean().sqrt() * codebook(bits).step
                first = taken(even / step, codes[b, h, n, 0::2])
                scale = max((even @ first) / (first @ first), 0.75 * step)
                target = odd - (scale * first - even).bfloat16().double() @ feedback[h].double()
                second = taken(target / scale, codes[b, h, n, 1::2])
                best = (even @ first + target @ second) / (first @ first + second @ second)
                assert scales[b, h, n].item() == pytest.approx(best.item(), rel=2**-10)
    plain, _ = reference.quantize(y, bits)
    assert torch.equal(codes[..., 0::2], plain[..., 0::2])
    assert not torch.equal(codes[..., 1::2], plain[..., 1::2])


@pytest.mark.parametrize("bits", BITS)
def test_empty_even_dims_do_not_spoil_the_odd_ones(bits: int, rng: torch.Generator) -> None:
    y = torch.randn(1, 2000, 64, generator=rng)
    feedback = torch.eye(32)[None] / 2
    y[..., 0::2] *= torch.tensor([0.0, 0.01, 0.1, 0.3]).repeat(500)[:, None]
    fed, plain = (reference.rounded(y, bits, f) - y for f in (feedback, None))
    assert fed.square().sum() < 2 * plain.square().sum() + 0.02 * y.square().sum()


@pytest.mark.parametrize("fed", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_zero_huge_and_broken_vectors(bits: int, fed: bool) -> None:
    y = torch.zeros(6, 64)
    y[1, 3] = 1e4
    y[2] = 3e6  # scale beyond float16
    y[5] = 1e30  # squares beyond float32
    y[3, 0] = torch.nan
    y[4, 0] = torch.inf
    _, scales = reference.quantize(y[None], bits, torch.eye(32)[None] / 2 if fed else None)
    scales = scales[0]
    assert scales[0] == 0
    assert scales[1] > 0
    assert scales[2] == 65504
    assert scales[3].isnan()
    assert scales[4].isnan()
    assert scales[5] == 65504


def append_all(
    state: list[torch.Tensor], k, v, chunks: list[int], start: list[int], maps: LayerMaps, window: int
) -> int:
    seen = 0
    for q in chunks:
        reference.append_(
            *state, k[:, :, seen : seen + q], v[:, :, seen : seen + q], torch.tensor(seen), torch.tensor(start),
            maps.key, maps.key_shift, maps.value, maps.value_shift, window,
        )  # fmt: skip
        seen += q
    return seen


def random_chunks(total: int, generator: random.Random) -> list[int]:
    chunks: list[int] = []
    while (left := total - sum(chunks)) > 0:
        chunks.append(min(left, generator.choice([1, 1, 2, 7, 32, 33, 90])))
    return chunks


@pytest.mark.parametrize(("sinks", "window"), [(4, 32), (0, 0), (4, 70), (0, 33)])
def test_any_chunking_gives_the_same_bytes(sinks: int, window: int, rng: torch.Generator, seed: int) -> None:
    total, start = 300, [0, 41]
    maps = layer_state.maps(2, 64, rng)
    k, v = (layer_state.tokens(2, 2, total, 64, rng) for _ in range(2))
    states = []
    for chunks in ([total], [1] * total, random_chunks(total, random.Random(seed))):
        states.append(layer_state.empty_cache(tokens=total, sinks=sinks, window=window))
        append_all(states[-1], k, v, chunks, start, maps, window)
    for other in states[1:]:
        for i in (0, 2, 4, 5):
            assert torch.equal(states[0][i], other[i])
        for i in (1, 3):
            assert torch.allclose(states[0][i], other[i], equal_nan=True, rtol=0, atol=0)
    for b, first in enumerate(start):  # ring slots no later token needs may differ: compare those that hold a token
        n = total - first
        packed = reference.packed_tokens(n, sinks, window, states[0][6].shape[2])
        slots = torch.arange(packed, n - sinks) % states[0][6].shape[2]
        assert all(torch.equal(states[0][i][b, :, slots], o[i][b, :, slots]) for i in (6, 7) for o in states[1:])


def test_a_left_padded_row_is_its_unpadded_run(rng: torch.Generator) -> None:
    total, pad, window = 250, 57, 32
    maps = layer_state.maps(2, 64, rng)
    k, v = (layer_state.tokens(2, 2, total, 64, rng) for _ in range(2))
    padded, alone = (layer_state.empty_cache(batch=b, tokens=total) for b in (2, 1))
    append_all(padded, k, v, [100, 1, 149], [0, pad], maps, window)
    append_all(alone, k[1:, :, pad:], v[1:, :, pad:], [total - pad], [0], maps, window)
    for a, b in zip(padded, alone, strict=True):
        assert torch.allclose(a[1:].double(), b.double(), equal_nan=True, rtol=0, atol=0)


def dense_attention(state, k_new, v_new, q, n_total, start, maps, window, softcap, sink_logits) -> torch.Tensor:
    """Float64 attention over keys and values decoded one by one into plain coordinates."""
    k_codes, k_scales, v_codes, v_scales, k_sinks, v_sinks, k_recent, v_recent = state
    batch, q_heads, q_len, dim = q.shape
    heads, sinks, ring = k_codes.shape[1], k_sinks.shape[2], k_recent.shape[2]
    out = torch.zeros(q.shape, dtype=torch.float64)
    k_all = reference.decode(k_codes, k_scales, dim, "key", torch.float64) @ maps.query.double().mT
    v_all = reference.decode(v_codes, v_scales, dim, "value", torch.float64) @ maps.output.double()
    for b in range(batch):
        n = max(0, n_total - start[b])
        packed = reference.packed_tokens(n, sinks, window, ring)
        for hq in range(q_heads):
            h = hq // (q_heads // heads)
            exact = [(k_sinks[b, h, t], v_sinks[b, h, t]) for t in range(min(n, sinks))]
            exact += [(k_recent[b, h, u % ring], v_recent[b, h, u % ring]) for u in range(packed, n - sinks)]
            keys = [k_all[b, h, u] + maps.key_shift[h].double() for u in range(packed)] + [e[0].double() for e in exact]
            values = [v_all[b, h, u] + maps.value_shift[h].double() for u in range(packed)]
            values += [e[1].double() for e in exact]
            for i in range(q_len):
                fresh = range(max(0, start[b] - n_total), i + 1) if k_new is not None else range(0)
                if k_new is not None and i < start[b] - n_total:
                    continue
                kk = torch.stack(keys + [k_new[b, h, j].double() for j in fresh])
                vv = torch.stack(values + [v_new[b, h, j].double() for j in fresh])
                s = kk @ q[b, hq, i].double() * SCALE
                s = softcap * torch.tanh(s / softcap) if softcap else s
                extra = s.new_zeros(0) if sink_logits is None else sink_logits[hq : hq + 1].double()
                out[b, hq, i] = torch.softmax(torch.cat([s, extra]), 0)[: len(s)] @ vv
    return out


@pytest.mark.parametrize(("softcap", "logits"), [(0.0, False), (3.0, True)])
@pytest.mark.parametrize(("seen", "pad"), [(150, 11), (20, 33), (0, 2)])
def test_attention_equals_dense_float64(seen, pad, softcap, logits, rng: torch.Generator) -> None:
    heads, group, dim, q_len, window = 2, 2, 64, 5, 32
    maps = layer_state.maps(heads, dim, rng)
    state = layer_state.empty_cache(dim=dim, tokens=max(32, seen))
    start = [0, pad]
    if seen:
        k, v = (layer_state.tokens(2, heads, seen, dim, rng) for _ in range(2))
        append_all(state, k, v, [seen], start, maps, window)
    for i in (1, 3):
        state[i].nan_to_num_()
    q = layer_state.tokens(2, heads * group, q_len, dim, rng)
    k_new, v_new = (layer_state.tokens(2, heads, q_len, dim, rng) for _ in range(2))
    sink_logits = torch.randn(heads * group, generator=rng) if logits else None
    got = reference.attention(
        q.double(), *state, torch.tensor(seen), torch.tensor(start), maps.query, maps.key_shift, maps.output,
        maps.value_shift, window, SCALE, softcap, sink_logits, k_new, v_new, torch.float64,
    )  # fmt: skip
    want = dense_attention(state, k_new, v_new, q, seen, start, maps, window, softcap, sink_logits)
    # The maps are inverses to float32 accuracy only.
    assert torch.allclose(got, want, atol=1e-5), (got - want).abs().max()


def test_no_ring_means_everything_is_packed(rng: torch.Generator) -> None:
    dim, n = 64, 45
    x = layer_state.tokens(1, 1, n, dim, rng)
    maps = layer_state.maps(1, dim, rng)
    kc, ks = reference.encode(x, maps.key, maps.key_shift, 8, "key")
    vc, vs = reference.encode(x, maps.value, maps.value_shift, 8, "value")
    none = torch.zeros(1, 1, 0, dim)
    q = layer_state.tokens(1, 1, 1, dim, rng)
    got = reference.attention(
        q, kc, ks, vc, vs, none, none, none, none, torch.tensor(n), torch.tensor([0]), maps.query, maps.key_shift,
        maps.output, maps.value_shift, 0, SCALE,
    )  # fmt: skip
    want = torch.softmax(q @ x.mT * SCALE, -1) @ x
    assert torch.allclose(got, want, atol=0.05)


def test_packed_bytes_are_the_codes_of_the_mapped_vectors(rng: torch.Generator) -> None:
    maps = layer_state.maps(2, 96, rng)
    x = layer_state.tokens(2, 2, 70, 96, rng)
    codes, scales = reference.encode(x, maps.key, maps.key_shift, 3, "key")
    want, want_scales = reference.quantize((x - maps.key_shift[:, None]) @ maps.key, 3)
    assert torch.equal(unpack(codes, 3, 96, "key")[:, :, :70], want.int())
    assert torch.equal(scales.flatten(2)[..., :70], want_scales)
    assert not scales.flatten(2)[..., 70:].any()


def test_bits_are_read_off_the_buffer_or_refused() -> None:
    assert reference.bits_of(torch.zeros(1, 768, dtype=torch.uint8), 64) == 3
    with pytest.raises(ValueError, match="expected"):
        reference.bits_of(torch.zeros(1, 700, dtype=torch.uint8), 64)
