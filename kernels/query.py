"""Query preparation and the exact part of a decode step, one launch.

For every query head x of a row (log2 domain, c = scale * log2(e); with a soft-cap also times 2 / (cap * log2(e))):

    y     = c / unit * x @ query_map            unit: grid units of the key codebook
    bias  = c * x . key_shift                   what packed scores lack against exact ones
    exact = online softmax over the sinks and the recent ring: maximum, sum and un-normalised output

y is written either as float32 (portable splits) or as 15-bit integers in two int8 rows: y = step * (128 hi + lo), the
form in which the integer tensor cores read it twice for free (hi in rows 0-7, lo in rows 8-15 of an m16 operand).
Grid: (batch * KV heads, tiles of 16 query heads).  Block: 16 query heads.
"""

import triton
import triton.language as tl


@triton.jit
def softcapped(s, cap):
    """cap * tanh(x / cap) * log2(e) with s = 2 x log2(e) / cap and cap = cap * log2(e)."""
    return cap - 2.0 * cap / (tl.exp2(s) + 1.0)


@triton.jit
def packed_count(n, sinks, window, capacity):
    """How many tokens of a row with n tokens are packed (reference.packed_tokens)."""
    return tl.where(capacity == 0, tl.maximum(n - sinks, 0), tl.maximum(n - sinks - window, 0) // 32 * 32)


@triton.jit
def _attend(
    x, m, l, o, p_k, p_v, first, count, slots, factor, cap,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Online softmax of x [16, DP] over `count` tokens at slots (first + i) % slots of k, v [slots, D]."""
    dims = tl.arange(0, DP)
    for begin in range(0, count, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        live = index < count
        at = ((first + index) % slots)[:, None] * D + dims[None, :]
        mask = live[:, None] & (dims < D)[None, :]
        # [BLOCK, DP]
        k = tl.load(p_k + at, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(p_v + at, mask=mask, other=0.0).to(tl.float32)
        s = tl.dot(x, tl.trans(k), input_precision="tf32x3") * factor
        if SOFTCAP:
            s = softcapped(s, cap)
        s = tl.where(live[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1))
        p = tl.exp2(s - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(p, axis=1)
        o = o * alpha[:, None] + tl.dot(p, v, input_precision="tf32x3")
        m = m_new
    return m, l, o


@triton.jit
def prepare_kernel(
    q, k_sinks, v_sinks, k_recent, v_recent, length, start, query_map, key_shift,
    rotated, meta, exact_o, exact_ml,
    stride_qb, stride_qh, stride_sb, stride_sh, stride_rb, stride_rh,
    heads, sinks, window, capacity, factor, inverse_unit, cap, k_low, k_high, v_low, v_high, k_half: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SPLIT_INT8: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """See the module docstring.

    rotated: int8 [B * H, tiles of 8 heads, 16, D] or float32 [B * Hq, D]; meta: float32 [B * H, tiles of 8, 4, 8] with
    rows step, bias, integer start value of a score, table words (bits); exact_o: float32 [B * Hq, D];
    exact_ml: float32 [2, B * Hq].  factor = scale * log2(e), times 2 / (cap * log2(e)) under a soft-cap.
    """
    bh = tl.program_id(0)
    group = tl.program_id(1)
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    row = tl.arange(0, 16)
    head = group * 16 + row  # within the KV head
    has_head = head < G
    dims = tl.arange(0, DP)
    in_dim = dims < D
    p_q = q + b * stride_qb + (h * G + head)[:, None] * stride_qh
    # [16, DP]
    x = tl.load(p_q + dims[None, :], mask=has_head[:, None] & in_dim[None, :], other=0.0).to(tl.float32)

    y = tl.zeros([16, DP], tl.float32)
    for k in range(0, D, 32):
        inner = k + tl.arange(0, 32)
        x_k = tl.load(p_q + inner[None, :], mask=has_head[:, None], other=0.0).to(tl.float32)
        p_map = query_map + h * D * D + inner[:, None] * D + dims[None, :]
        y += tl.dot(x_k, tl.load(p_map, mask=in_dim[None, :], other=0.0), input_precision="tf32x3")
    y *= factor * inverse_unit
    bias = tl.sum(x * tl.load(key_shift + h * D + dims, mask=in_dim, other=0.0)[None, :], axis=1) * factor

    TILES: tl.constexpr = (G + 7) // 8
    tile = bh.to(tl.int64) * TILES + head // 8
    in_tile = head // 8 < TILES
    m_row = meta + tile * 32 + head % 8
    if SPLIT_INT8:
        step = tl.max(tl.abs(y), axis=1) / 127.0
        y = y * (1.0 / tl.maximum(step, 1e-37))[:, None]
        # Adding 1.5 * 2**23 rounds to the nearest integer.
        hi = (y + 12582912.0) - 12582912.0
        lo = ((y - hi) * 128.0 + 12582912.0) - 12582912.0
        p_hi = rotated + (tile * 16 + head % 8)[:, None] * D + dims[None, :]
        write = in_tile[:, None] & in_dim[None, :]
        tl.store(p_hi, hi.to(tl.int8), mask=write)
        tl.store(p_hi + 8 * D, lo.to(tl.int8), mask=write)
        tl.store(m_row, step / 128.0, mask=in_tile)
        # 4-bit key levels are grid + 1/2: half the sum of the query is where the integer score starts.
        tl.store(m_row + 16, tl.sum(hi * 128.0 + lo, axis=1) * k_half, mask=in_tile)
        tables = m_row + 24
        word = head % 4  # each twice: see decode_gluon._table_word
        table = tl.where(word == 0, k_low, tl.where(word == 1, k_high, tl.where(word == 2, v_low, v_high)))
        tl.store(tables, table.to(tl.int32).to(tl.float32, bitcast=True), mask=in_tile)
    else:
        p_y = rotated + (bh * G + head).to(tl.int64)[:, None] * D + dims[None, :]
        tl.store(p_y, y, mask=has_head[:, None] & in_dim[None, :])
    tl.store(m_row + 8, bias, mask=in_tile)

    n = tl.maximum(tl.load(length) - tl.load(start + b), 0).to(tl.int32)
    packed = packed_count(n, sinks, window, capacity)
    m = tl.full([16], -1e30, tl.float32)
    l = tl.zeros([16], tl.float32)
    o = tl.zeros([16, DP], tl.float32)
    at_s = b * stride_sb + h * stride_sh
    at_r = b * stride_rb + h * stride_rh
    m, l, o = _attend(
        x, m, l, o, k_sinks + at_s, v_sinks + at_s, 0, tl.minimum(n, sinks), tl.maximum(sinks, 1), factor, cap,
        D, DP, 16, SOFTCAP,
    )  # fmt: skip
    recent = tl.where(capacity == 0, 0, tl.maximum(n - sinks, 0) - packed)
    m, l, o = _attend(
        x, m, l, o, k_recent + at_r, v_recent + at_r, packed, recent, tl.maximum(capacity, 1), factor, cap,
        D, DP, BLOCK, SOFTCAP,
    )  # fmt: skip
    q_row = (bh * G + head).to(tl.int64)
    tl.store(exact_o + q_row[:, None] * D + dims[None, :], o, mask=has_head[:, None] & in_dim[None, :])
    rows = tl.num_programs(0).to(tl.int64) * G
    tl.store(exact_ml + q_row, m, mask=has_head)
    tl.store(exact_ml + rows + q_row, l, mask=has_head)
