"""Query preparation and the exact part of a decode step, one launch of two kinds of programs.

For every query head x of a row (log2 domain, c = scale * log2(e); with a soft-cap also times 2 / (cap * log2(e))):

    y     = c / unit * x @ query_map            unit: grid units of the key codebook
    bias  = c * x . key_shift                   what packed scores lack against exact ones
    exact = softmax over CHUNK of the exact tokens (sinks, then the recent ring): maximum, sum, un-normalised output

y is written either as float32 (portable splits) or as 15-bit integers in two int8 rows: y = step * (128 hi + lo), the
form in which the integer tensor cores read it twice for free (hi in rows 0-7, lo in rows 8-15 of an m16 operand).
Grid: first heads * ceil(B * G / 16) programs that prepare 16 queries of one KV head, taken across the batch; then, if
EXACT (the Gluon kernel attends to 16-bit windows itself), one program for each (row, KV head, 16 of its query heads,
chunk of exact tokens).
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
def _prepare(
    pid, q, query_map, key_shift, rotated, meta, stride_qb, stride_qh, batch, heads, factor, inverse_unit,
    k_low, k_high, v_low, v_high, K_HALF: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    KC: tl.constexpr, SPLIT_INT8: tl.constexpr,
):  # fmt: skip
    """Map 16 queries of KV head pid % heads."""
    h = (pid % heads).to(tl.int64)
    index = pid // heads * 16 + tl.arange(0, 16)
    b = (index // G).to(tl.int64)
    g = index % G
    live = b < batch
    dims = tl.arange(0, DP)
    in_dim = dims < D
    p_q = q + b[:, None] * stride_qb + (h * G + g)[:, None] * stride_qh
    y = tl.zeros([16, DP], tl.float32)
    bias = tl.zeros([16], tl.float32)
    for k in tl.static_range(0, D, KC):
        inner = k + tl.arange(0, KC)
        # [16, KC], [KC, DP]
        x = tl.load(p_q + inner[None, :], mask=live[:, None], other=0.0).to(tl.float32)
        part = tl.load(query_map + h * D * D + inner[:, None] * D + dims[None, :], mask=in_dim[None, :], other=0.0)
        y += tl.dot(x, part, input_precision="tf32x3")
        bias += tl.sum(x * tl.load(key_shift + h * D + inner)[None, :], axis=1)
    y *= factor * inverse_unit
    bias *= factor

    TILES: tl.constexpr = (G + 7) // 8
    bh = b * heads + h
    p_meta = meta + (bh * TILES + g // 8) * 32 + g % 8
    write = live[:, None] & in_dim[None, :]
    if SPLIT_INT8:
        step = tl.max(tl.abs(y), axis=1) / 127.0
        y = y * (1.0 / tl.maximum(step, 1e-37))[:, None]
        # Adding 1.5 * 2**23 rounds to the nearest integer.
        hi = (y + 12582912.0) - 12582912.0
        lo = ((y - hi) * 128.0 + 12582912.0) - 12582912.0
        p_hi = rotated + ((bh * TILES + g // 8) * 16 + g % 8)[:, None] * D + dims[None, :]
        tl.store(p_hi, hi.to(tl.int8), mask=write)
        tl.store(p_hi + 8 * D, lo.to(tl.int8), mask=write)
        tl.store(p_meta, step / 128.0, mask=live)
        # 4-bit key levels are grid + 1/2: half the sum of the query is where the integer score starts.
        tl.store(p_meta + 16, tl.sum(hi * 128.0 + lo, axis=1) * K_HALF, mask=live)
        # The table words of this head's tiles, twice (decode_gluon._table_word); every head of a tile writes all.
        for i in tl.static_range(8):
            word = k_low if i % 4 == 0 else k_high if i % 4 == 1 else v_low if i % 4 == 2 else v_high
            bits = tl.full([16], 0, tl.int32) + word
            tl.store(p_meta - g % 8 + 24 + i, bits.to(tl.float32, bitcast=True), mask=live)
    else:
        tl.store(rotated + (bh * G + g)[:, None] * D + dims[None, :], y, mask=write)
    tl.store(p_meta + 8, bias, mask=live)


@triton.jit
def _attend_exact(
    pid, q, k_sinks, v_sinks, k_recent, v_recent, length, start, exact_o, exact_ml,
    stride_qb, stride_qh, stride_sb, stride_sh, stride_rb, stride_rh,
    batch, heads, sinks, window, capacity, chunks, factor, cap,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SOFTCAP: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of up to 16 query heads over CHUNK exact tokens of one row and KV head."""
    chunk = pid % chunks
    GROUPS: tl.constexpr = (G + 15) // 16
    group = pid // chunks % GROUPS
    bh = pid // (chunks * GROUPS)
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    n = tl.maximum(tl.load(length) - tl.load(start + b), 0).to(tl.int32)
    packed = packed_count(n, sinks, window, capacity)
    in_sinks = tl.minimum(n, sinks)
    count = in_sinks + tl.where(capacity == 0, 0, tl.maximum(n - sinks, 0) - packed)

    head = group * 16 + tl.arange(0, 16)
    has_head = head < G
    dims = tl.arange(0, DP)
    index = chunk * CHUNK + tl.arange(0, CHUNK)
    is_sink = index < in_sinks
    is_recent = (index >= in_sinks) & (index < count)
    live = is_sink | is_recent
    slot = tl.where(is_sink, index, (packed + index - in_sinks) % tl.maximum(capacity, 1))
    at = slot[:, None] * D + dims[None, :]
    in_dim = (dims < D)[None, :]
    at_s = b * stride_sb + h * stride_sh + at
    at_r = b * stride_rb + h * stride_rh + at
    mask_s = is_sink[:, None] & in_dim
    mask_r = is_recent[:, None] & in_dim
    # [CHUNK, DP]; one of the two loads of a row is masked off
    k = tl.load(k_recent + at_r, mask=mask_r, other=0.0).to(tl.float32)
    v = tl.load(v_recent + at_r, mask=mask_r, other=0.0).to(tl.float32)
    p_q = q + b * stride_qb + (h * G + head)[:, None] * stride_qh + dims[None, :]
    x = tl.load(p_q, mask=has_head[:, None] & in_dim, other=0.0).to(tl.float32)
    if chunk * CHUNK < in_sinks:
        k += tl.load(k_sinks + at_s, mask=mask_s, other=0.0).to(tl.float32)
        v += tl.load(v_sinks + at_s, mask=mask_s, other=0.0).to(tl.float32)
    s = tl.dot(x, tl.trans(k), input_precision=PRECISION) * factor
    if SOFTCAP:
        s = softcapped(s, cap)
    s = tl.where(live[None, :], s, float("-inf"))
    m = tl.maximum(tl.max(s, axis=1), -1e30)
    p = tl.exp2(s - m[:, None])
    if PRECISION == "tf32":  # what the product below sees, so that it and the sum agree
        p = (p.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    q_row = ((bh * chunks + chunk) * G + head).to(tl.int64)
    rows = tl.cast(batch, tl.int64) * heads * chunks * G
    tl.store(exact_ml + q_row, m, mask=has_head)
    tl.store(exact_ml + rows + q_row, tl.sum(p, axis=1), mask=has_head)
    if chunk * CHUNK < count:
        o = tl.dot(p, v, input_precision=PRECISION)
        tl.store(exact_o + q_row[:, None] * D + dims[None, :], o, mask=has_head[:, None] & in_dim)


@triton.jit
def prepare_kernel(
    q, k_sinks, v_sinks, k_recent, v_recent, length, start, query_map, key_shift, rotated, meta, exact_o, exact_ml,
    stride_qb, stride_qh, stride_sb, stride_sh, stride_rb, stride_rh,
    batch, heads, sinks, window, capacity, chunks, factor, inverse_unit, cap, k_low, k_high, v_low, v_high,
    K_HALF: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, KC: tl.constexpr,
    SPLIT_INT8: tl.constexpr, SOFTCAP: tl.constexpr, EXACT: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """See the module docstring.

    rotated: int8 [B * H, tiles of 8 heads, 16, D] or float32 [B * Hq, D]; meta: float32 [B * H, tiles of 8, 4, 8] with
    rows step, bias, integer start value of a score, table words (bits); exact_o: float32 [B * H, chunks, G, D], not
    written where a chunk is empty; exact_ml: float32 [2, B * H, chunks, G].
    factor = scale * log2(e), times 2 / (cap * log2(e)) under a soft-cap.
    """
    if PDL:  # the splits may be launched now; they wait where they need the queries
        tl.extra.cuda.gdc_launch_dependents()
    pid = tl.program_id(0)
    maps = heads * ((batch * G + 15) // 16)
    if pid < maps:
        _prepare(
            pid, q, query_map, key_shift, rotated, meta, stride_qb, stride_qh, batch, heads, factor, inverse_unit,
            k_low, k_high, v_low, v_high, K_HALF, G, D, DP, KC, SPLIT_INT8,
        )  # fmt: skip
    elif EXACT:
        _attend_exact(
            pid - maps, q, k_sinks, v_sinks, k_recent, v_recent, length, start, exact_o, exact_ml,
            stride_qb, stride_qh, stride_sb, stride_sh, stride_rb, stride_rh,
            batch, heads, sinks, window, capacity, chunks, factor, cap, G, D, DP, SOFTCAP, CHUNK, PRECISION,
        )  # fmt: skip
