"""Splits of a decode step over packed K and V in plain Triton: any GPU Triton knows, and its interpreter.

Reads the same tiles as the Gluon kernel, code by code: where the code of (token, dim) sits in a tile (packing.py) does
not depend on the tile, so word addresses and shifts are computed once per program and every tile is a gather of
words, a shift, a mask and a subtraction.  A warp's 32 gathers of one register hit a few cache lines.
Grid: (splits, batch * KV heads, tiles of 16 query heads).  Block: 16 query heads x 32 tokens.
"""

import triton
import triton.language as tl

from .query import packed_count, softcapped


@triton.jit
def _positions(token, dim, D: tl.constexpr, BITS: tl.constexpr, KEY: tl.constexpr):
    """Of code (token, dim): its first word in a tile, its shift, whether it is spread over three words, and what it is
    xor-ed with (packing.py)."""
    if KEY:
        lane = token % 8 * 4 + dim // 4 % 4
        s = dim // 16 % 2 * 2 + token // 8 % 2
        nibble = dim % 4 * 2 + token // 16
        word, byte = token // 8 * 2 + dim // 16 % 2, dim % 4  # at 8 bits
    else:
        lane = dim % 8 * 4 + token // 2 % 4
        if BITS >= 3:
            s = token // 8
            nibble = token % 2 * 4 + dim // 8 % 2 * 2 + dim // 16 % 2
        else:
            s = token // 16 * 2 + dim // 8 % 2
            nibble = token % 2 * 4 + token // 8 % 2 * 2 + dim // 16 % 2
        # 8 bits
        word, byte = dim // 16 % 2 * 4 + dim // 8 % 2 * 2 + token // 16, token // 8 % 2 * 2 + token % 2
    if BITS == 8:
        shift = byte * 8
    elif BITS == 4:
        word, shift = s, nibble * 4
    elif BITS == 3:
        word, shift = tl.where(s < 3, s, 0), nibble * 4 + tl.where(s < 3, 1, 0)
    else:
        word, shift = s * BITS // 4, nibble * 4 + s * BITS % 4
    # The highest bit of keys is inverted where it is bit 7 of a byte, and so is that of the codes spread at 3 bits.
    ends = (nibble % 2 == 1) & (KEY and BITS > 1 and BITS < 8) & ((BITS != 2) | (s % 2 == 1))
    return (word * 32 + lane) * (D // 32) + dim // 32, shift, (s == 3) & (BITS == 3), ends.to(tl.int32) << (BITS - 1)


@triton.jit
def _levels(p_words, address, shift, spread, flip, live, D: tl.constexpr, BITS: tl.constexpr):
    """Levels of codes as fp16, which holds them exactly (at 8 bits times 127)."""
    x = tl.load(p_words + address, mask=live, other=0) >> shift
    if BITS == 8:
        code = (x << 24) >> 24
    elif BITS == 3:
        y = tl.load(p_words + address + D, mask=live & spread, other=0) >> shift
        z = tl.load(p_words + address + 2 * D, mask=live & spread, other=0) >> shift
        code = tl.where(spread, (x & 1) << 2 | (y & 1) << 1 | (z & 1), x & 7) ^ flip
    else:
        code = (x & ((1 << BITS) - 1)) ^ flip
    level = code.to(tl.float32)
    if BITS < 8:
        level -= ((1 << BITS) - 1) * 0.5
    return level.to(tl.float16)


@triton.jit(do_not_specialize=["splits"])
def portable_splits_kernel(
    rotated, bias, k_codes, k_scales, v_codes, v_scales, length, start, split_o, split_ml,
    stride_kb, stride_kh, stride_ksb, stride_ksh, stride_vb, stride_vh, stride_vsb, stride_vsh,
    heads, sinks, window, capacity, splits, cap, inverse_unit,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Un-normalised output, maximum (log2, bias included) and sum of each split of the packed tokens.

    rotated: float32 [B * Hq, D] and bias: float32 [B * Hq], as `query.prepare_kernel` writes them; k_codes, v_codes:
    int32 words [B, H, T, words]; outputs as `combine.combine_kernel` reads them, times inverse_unit.
    """
    split = tl.program_id(0)
    bh = tl.program_id(1)
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    row = tl.arange(0, 16)
    head = tl.program_id(2) * 16 + row
    has_head = head < G
    dims = tl.arange(0, DP)
    in_dim = dims < D
    q_row = (bh * G + head).to(tl.int64)
    # [16, DP]
    y = tl.load(rotated + q_row[:, None] * D + dims[None, :], mask=has_head[:, None] & in_dim[None, :], other=0.0)
    bias = tl.load(bias + q_row, mask=has_head, other=0.0)
    # Levels are exact in fp16; queries and probabilities are split in two fp16 parts, high + low / 2048.
    step = tl.maximum(tl.max(tl.abs(y), axis=1), 1e-37)
    y = y * (1.0 / step)[:, None]
    y_hi = y.to(tl.float16)
    y_lo = ((y - y_hi.to(tl.float32)) * 2048.0).to(tl.float16)

    n = tl.maximum(tl.load(length) - tl.load(start + b), 0).to(tl.int32)
    packed = packed_count(n, sinks, window, capacity)
    tiles = (packed + 31) // 32
    begin = (split.to(tl.int64) * tiles // splits).to(tl.int32)
    end = ((split + 1).to(tl.int64) * tiles // splits).to(tl.int32)

    tok = tl.arange(0, 32)
    # [DP, 32], [32, DP]
    k_at, k_shift, k_spread, k_flip = _positions(tok[None, :], dims[:, None], D, K_BITS, True)
    v_at, v_shift, v_spread, v_flip = _positions(tok[:, None], dims[None, :], D, V_BITS, False)

    m = tl.full([16], -1e30, tl.float32)
    l = tl.zeros([16], tl.float32)
    acc = tl.zeros([16, DP], tl.float32)
    p_k = k_codes + b * stride_kb + h * stride_kh
    p_v = v_codes + b * stride_vb + h * stride_vh
    p_ks = k_scales + b * stride_ksb + h * stride_ksh + tok
    p_vs = v_scales + b * stride_vsb + h * stride_vsh + tok
    at = begin.to(tl.int64)
    for tile in range(begin, end):
        live = tile * 32 + tok < packed
        k = _levels(p_k + at * (D * K_BITS), k_at, k_shift, k_spread, k_flip, in_dim[:, None], D, K_BITS)
        s = tl.dot(y_hi, k) + tl.dot(y_lo, k) * (1.0 / 2048.0)
        s *= step[:, None] * tl.load(p_ks + at * 32, mask=live, other=0.0).to(tl.float32)[None, :]
        if SOFTCAP:
            s = softcapped(s + bias[:, None], cap)
        s = tl.where(live[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1))
        p = tl.exp2(s - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(p, axis=1)
        p *= tl.load(p_vs + at * 32, mask=live, other=0.0).to(tl.float32)[None, :]
        v = _levels(p_v + at * (D * V_BITS), v_at, v_shift, v_spread, v_flip, in_dim[None, :], D, V_BITS)
        p_hi = p.to(tl.float16)
        p_lo = ((p - p_hi.to(tl.float32)) * 2048.0).to(tl.float16)
        acc = acc * alpha[:, None] + tl.dot(p_hi, v) + tl.dot(p_lo, v) * (1.0 / 2048.0)
        m = m_new
        at += 1
    if not SOFTCAP:
        m += bias

    at_split = (bh * splits + split).to(tl.int64) * G + head
    write = has_head[:, None] & in_dim[None, :]
    tl.store(split_o + at_split[:, None] * D + dims[None, :], acc * inverse_unit, mask=write)
    tl.store(split_ml + 2 * at_split, m, mask=has_head)
    tl.store(split_ml + 2 * at_split + 1, l, mask=has_head)
