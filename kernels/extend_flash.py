"""Flash attention of several queries, in two launches that leave partial outputs: see extend_attention.py.

`packed_kernel` unpacks K and V operands in registers once per block of query rows (all G query heads of a KV head share
a block), `exact_kernel` reads sinks, ring and new tokens.  Both store normalised outputs and the log2 of their softmax
sums.
"""

import triton
import triton.language as tl

from .levels import unpack

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def geometry(length, start, b, q, sinks, window, capacity):
    """Of row b: padding among the q new tokens, tokens in the cache, packed tokens (reference.py)."""
    seen = tl.load(length).to(tl.int64)
    first = tl.load(start + b).to(tl.int64)
    skip = tl.minimum(tl.maximum(first - seen, 0), q)
    n = tl.maximum(seen - first, 0)
    left = tl.maximum(n - sinks - window, 0) // 32 * 32
    packed = tl.where(capacity == 0, tl.maximum(n - sinks, 0), left)
    return skip, n, packed


@triton.jit
def _cap(s, softcap, CAP: tl.constexpr):
    """Scores -> log2 units, after the logit soft-cap if there is one."""
    if CAP:
        s = softcap * (1.0 - 2.0 / (1.0 + tl.exp2(s * (2.0 * LOG2E / softcap))))
    return s * LOG2E


@triton.jit
def _accumulate(s, v, weight, m, z, acc, PRECISION: tl.constexpr):
    """One step of online softmax; s [M, N] in log2 units, weight [N] multiplies the probabilities that meet v."""
    m_new = tl.maximum(m, tl.max(s, axis=1))
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s - base[:, None])
    alpha = tl.exp2(m - base)
    z = z * alpha + tl.sum(p, axis=1)
    if weight is not None:
        p = p * weight[None, :]
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return m_new, z, acc


@triton.jit
def _store_partial(out, lse, at, ok, m, z, acc, D: tl.constexpr, DP: tl.constexpr):
    dims = tl.arange(0, DP)
    o = acc * tl.where(z > 0, 1.0 / z, 0.0)[:, None]
    tl.store(out + at[:, None] * D + dims[None, :], o, mask=ok[:, None] & (dims < D)[None, :])
    tl.store(lse + at, tl.where(z > 0, m + tl.log2(z), float("-inf")), mask=ok)


@triton.jit
def _packed_block(
    q, row_factor, row_bias, first, end, k_words, k_scales, v_words, v_scales, kw_st, ks_st, vw_st, vs_st,
    softcap, m, z, acc,
    D: tl.constexpr, DP: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr,
    K_ASM: tl.constexpr, V_ASM: tl.constexpr,
    CAP: tl.constexpr, TILES: tl.constexpr, V_OPERAND: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """TILES tiles from token `first` on; MASKED: those at `end` and later are hidden."""
    tile = first // 32 + tl.arange(0, TILES).to(tl.int64)
    tile_ok = tile * 32 < end
    live = first + tl.arange(0, TILES * 32) < end
    # Both scales in one load: the compiler repeats a load of fewer elements than threads in every thread's layout.
    index = tl.arange(0, TILES * 64)
    token = first + (index % (TILES * 32)).to(tl.int64)
    k_at = k_scales + token // 32 * ks_st + token % 32
    at = tl.where(index < TILES * 32, k_at, v_scales + token // 32 * vs_st + token % 32)
    both = tl.load(at, mask=token < end, other=0.0).to(tl.float32)
    k_scale, v_scale = tl.split(tl.trans(tl.reshape(both, [2, TILES * 32])))
    k = unpack(k_words, kw_st, tile, tile_ok, D, DP, K_BITS, True, K_ASM, q.dtype)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * row_factor[:, None] * k_scale[None, :]
    s += row_bias[:, None]
    if CAP:
        s = _cap(s, softcap, CAP)
    if MASKED:
        s = tl.where(live[None, :], s, float("-inf"))
    v = unpack(v_words, vw_st, tile, tile_ok, D, DP, V_BITS, False, V_ASM, V_OPERAND)
    return _accumulate(s, tl.trans(v), v_scale, m, z, acc, PRECISION)


@triton.jit(do_not_specialize=["q_len"])
def packed_kernel(
    rotated, unit, bias, k_words, k_scales, v_words, v_scales, out, lse, length, start,
    kw_sb, kw_sh, kw_st, ks_sb, ks_sh, ks_st, vw_sb, vw_sh, vw_st, vs_sb, vs_sh, vs_st,
    heads, group, q_len, capacity, sinks, window, scale, k_factor, v_factor, softcap,
    D: tl.constexpr, DP: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr,
    K_ASM: tl.constexpr, V_ASM: tl.constexpr,
    CAP: tl.constexpr, M: tl.constexpr, TILES: tl.constexpr, V_OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial attention over a share of the packed tiles, in the maps' coordinates.

    Grid: (blocks of M rows, B * H, splits).  Row r of a KV head is query r // group of its query head r % group.
    out float32 [splits, B * Hq, q_len, D], lse float32 [splits, B * Hq, q_len] (log2).
    """
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (tl.program_id(1) % heads).to(tl.int64)
    _, _, packed = geometry(length, start, b, q_len, sinks, window, capacity)
    r = tl.program_id(0) * M + tl.arange(0, M)
    ok = r < q_len * group
    at = (tl.program_id(1).to(tl.int64) * group + r % group) * q_len + r // group
    dims = tl.arange(0, DP)
    q = tl.load(rotated + at[:, None] * D + dims[None, :], mask=ok[:, None] & (dims < D)[None, :], other=0.0)
    row_factor = tl.load(unit + at, mask=ok, other=0.0) * (scale * k_factor)
    row_bias = tl.load(bias + at, mask=ok, other=0.0) * scale
    if not CAP:
        row_factor *= LOG2E
        row_bias *= LOG2E
    k_words += b * kw_sb + h * kw_sh
    v_words += b * vw_sb + h * vw_sh
    k_scales += b * ks_sb + h * ks_sh
    v_scales += b * vs_sb + h * vs_sh

    tokens = packed.to(tl.int32)
    share = tl.cdiv(tl.cdiv(tokens, TILES * 32), tl.num_programs(2)) * (TILES * 32)
    begin = tl.program_id(2) * share
    end = tl.minimum(begin + share, tokens)
    m = tl.full([M], float("-inf"), tl.float32)
    z = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DP], tl.float32)
    full = begin + tl.maximum(end - begin, 0) // (TILES * 32) * (TILES * 32)
    for first in range(begin, full, TILES * 32):
        m, z, acc = _packed_block(
            q, row_factor, row_bias, first, end, k_words, k_scales, v_words, v_scales, kw_st, ks_st, vw_st, vs_st,
            softcap, m, z, acc,
            D, DP, K_BITS, V_BITS, K_ASM, V_ASM, CAP, TILES, V_OPERAND, PRECISION, False,
        )  # fmt: skip
    if full < end:
        m, z, acc = _packed_block(
            q, row_factor, row_bias, full, end, k_words, k_scales, v_words, v_scales, kw_st, ks_st, vw_st, vs_st,
            softcap, m, z, acc,
            D, DP, K_BITS, V_BITS, K_ASM, V_ASM, CAP, TILES, V_OPERAND, PRECISION, True,
        )  # fmt: skip
    at += tl.program_id(2).to(tl.int64) * tl.num_programs(1) * group * q_len
    _store_partial(out, lse, at, ok, m, z, acc * v_factor, D, DP)


@triton.jit
def _attend(
    q, k, v, token, live, visible, k_sn, k_sd, v_sn, v_sd, scale, softcap, m, z, acc,
    D: tl.constexpr, DP: tl.constexpr, CAP: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of exact tokens; visible [M, N] (or [1, N]) applies when MASKED."""
    dims = tl.arange(0, DP)
    inside = (dims < D)[None, :] & live[:, None]
    k = tl.load(k + token[:, None] * k_sn + dims[None, :] * k_sd, mask=inside, other=0.0).to(q.dtype)
    s = _cap(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale, softcap, CAP)
    if MASKED:
        s = tl.where(visible, s, float("-inf"))
    v = tl.load(v + token[:, None] * v_sn + dims[None, :] * v_sd, mask=inside, other=0.0).to(q.dtype)
    return _accumulate(s, v, None, m, z, acc, PRECISION)


@triton.jit(do_not_specialize=["q_len"])
def exact_kernel(
    q, k_new, v_new, k_sinks, v_sinks, k_recent, v_recent, out, lse, length, start,
    q_sb, q_sh, q_sn, q_sd, k_sb, k_sh, k_sn, k_sd, v_sb, v_sh, v_sn, v_sd,
    e_sb, e_sh, e_sn, e_sd, r_sb, r_sh, r_sn, r_sd,
    heads, group, q_len, capacity, sinks, window, scale, softcap,
    D: tl.constexpr, DP: tl.constexpr, CAP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Partial attention over sinks, ring and (causally) the new tokens.

    Grid: (blocks of M rows, the last rows first, B * H).  out float32 [B * Hq, q_len, D], lse [B * Hq, q_len].
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (tl.program_id(1) % heads).to(tl.int64)
    skip, n, packed = geometry(length, start, b, q_len, sinks, window, capacity)
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    r = block * M + tl.arange(0, M)
    ok = r < q_len * group
    i = r // group
    dims = tl.arange(0, DP)
    at_q = q + b * q_sb + (h * group + r % group)[:, None] * q_sh + i.to(tl.int64)[:, None] * q_sn
    query = tl.load(at_q + dims[None, :] * q_sd, mask=ok[:, None] & (dims < D)[None, :], other=0.0).to(OPERAND)
    m = tl.full([M], float("-inf"), tl.float32)
    z = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DP], tl.float32)
    column = tl.arange(0, N)

    k_new += b * k_sb + h * k_sh
    v_new += b * v_sb + h * v_sh
    first_query = block * M // group
    last_query = tl.minimum((block * M + M - 1) // group, q_len - 1)
    # New tokens every row of the block sees, then those on the diagonal.
    skip = skip.to(tl.int32)
    whole = skip + tl.maximum(first_query + 1 - skip, 0) // N * N
    for first in range(skip, whole, N):
        token = (first + column).to(tl.int64)
        live = token >= 0
        m, z, acc = _attend(
            query, k_new, v_new, token, live, live[None, :],
            k_sn, k_sd, v_sn, v_sd, scale, softcap, m, z, acc, D, DP, CAP, False, PRECISION,
        )  # fmt: skip
    for first in range(whole, last_query + 1, N):
        token = (first + column).to(tl.int64)
        visible = token[None, :] <= i[:, None]
        m, z, acc = _attend(
            query, k_new, v_new, token, token <= last_query, visible,
            k_sn, k_sd, v_sn, v_sd, scale, softcap, m, z, acc, D, DP, CAP, True, PRECISION,
        )  # fmt: skip

    k_sinks += b * e_sb + h * e_sh
    v_sinks += b * e_sb + h * e_sh
    held = tl.minimum(n, sinks).to(tl.int32)
    for first in range(0, held, N):
        token = (first + column).to(tl.int64)
        live = token < held
        m, z, acc = _attend(
            query, k_sinks, v_sinks, token, live, live[None, :],
            e_sn, e_sd, e_sn, e_sd, scale, softcap, m, z, acc, D, DP, CAP, True, PRECISION,
        )  # fmt: skip
    k_recent += b * r_sb + h * r_sh
    v_recent += b * r_sb + h * r_sh
    newest = tl.maximum(n - sinks, packed)
    for first in range(0, (newest - packed).to(tl.int32), N):
        u = packed + first + column
        live = u < newest
        m, z, acc = _attend(
            query, k_recent, v_recent, u % tl.maximum(capacity, 1), live, live[None, :],
            r_sn, r_sd, r_sn, r_sd, scale, softcap, m, z, acc, D, DP, CAP, True, PRECISION,
        )  # fmt: skip
    at = (tl.program_id(1).to(tl.int64) * group + r % group) * q_len + i
    _store_partial(out, lse, at, ok, m, z, acc, D, DP)
