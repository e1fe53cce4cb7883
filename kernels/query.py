"""Query preparation and, for windows that the splits do not read, the exact part of a decode step: one launch.

For every query head x of a row (log2 domain, c = scale * log2(e); with a soft-cap also times 2 / cap):

    y     = c / unit * x @ query_map            unit: 127 for 8-bit keys, whose levels are code / 127, else 1
    bias  = c * x . key_shift                   what packed scores lack against exact ones
    exact = softmax over CHUNK of the exact tokens (sinks, then the recent ring): maximum, sum, un-normalised output

Grid: first heads * ceil(B * G / 16) * D / COLUMNS programs that map 16 queries of one KV head, taken across the batch,
to COLUMNS dimensions, so that no program waits for a whole map; then, if EXACT (the Gluon kernel attends to 16-bit
windows itself), one program for each (row, KV head, 16 of its query heads, chunk of exact tokens).

`prepare_few_kernel` does it for a few queries to a head, which are more heads to what follows: row r of a KV head
is query r % q_len of its query head r // q_len.  Further programs attend to the new tokens: one exact part more.

Of the map programs each also sets some of the splits' counters of claimed steps to zero.

Under programmatic dependent launch (PDL) this launch begins while the one before it ends, and lets the splits begin
once that has: they wait where they need the queries.
"""

import triton
import triton.language as tl

from .mapped import map_operands


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
    pid, q, length, start, query_map, key_shift, rotated, bias, claims, stride_qb, stride_qh, stride_qn, batch, heads,
    group, q_len, counters, factor, inverse_unit,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, COLUMNS: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """Map 16 queries of KV head pid % heads to dimensions COLUMNS * (pid // heads % (D / COLUMNS)) and on.

    FEW: of the G rows of a KV head, group * q_len are queries, the others and queries of padding tokens zeros.
    """
    PARTS: tl.constexpr = D // COLUMNS
    h = (pid % heads).to(tl.int64)
    part = pid // heads % PARTS
    index = pid // (heads * PARTS) * 16 + tl.arange(0, 16)
    b = (index // G).to(tl.int64)
    g = index % G
    live = b < batch
    if FEW:
        p_q = q + b[:, None] * stride_qb + (h * group + g // q_len)[:, None] * stride_qh
        p_q += (g % q_len).to(tl.int64)[:, None] * stride_qn
    else:
        p_q = q + b[:, None] * stride_qb + (h * G + g)[:, None] * stride_qh
    column = part * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, DP)
    inside = inner < D
    p_map = query_map + h * D * D
    # A line of each row on its way to L2 while the launch before ends (more gained nothing); a load before the wait
    # would race with one that writes the map.  It waits before it lets the splits begin: they read without.
    if PDL:
        line = tl.where(inside, p_map + inner * D + part * COLUMNS, p_map)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; // $0", "=r,l", [line], dtype=tl.int32, is_pure=False, pack=1
        )
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    given = live
    if FEW:
        skip = tl.load(start + b, mask=live, other=0) - tl.load(length)  # padding among the new tokens, if positive
        given = live & (g < group * q_len) & (g % q_len >= skip)
    # [DP, COLUMNS]
    part_map = tl.load(p_map + inner[:, None] * D + column[None, :], mask=inside[:, None], other=0.0)
    shift = tl.load(key_shift + h * D + inner, mask=inside, other=0.0)
    x = tl.load(p_q + inner[None, :], mask=given[:, None] & inside[None, :], other=0.0).to(tl.float32)
    if q.dtype.element_ty == tl.bfloat16:  # exact queries, the map in two parts: 17 bits
        m_high, m_low = map_operands(part_map, OPERAND)
        y = tl.dot(x.to(OPERAND), m_low, input_precision="ieee")
        y = tl.dot(x.to(OPERAND), m_high, y, input_precision="ieee")
    else:
        EXACTLY: tl.constexpr = "ieee" if PRECISION == "ieee" else "tf32x3"
        y = tl.dot(x, part_map, input_precision=EXACTLY)
    row = (b * heads + h) * G + g
    tl.store(rotated + row[:, None] * D + column[None, :], y * (factor * inverse_unit), mask=live[:, None])
    if part == 0:
        tl.store(bias + row, tl.sum(x * shift[None, :], axis=1) * factor, mask=live)
    index = pid.to(tl.int64) * 128 + tl.arange(0, 128)  # enough: one serves 8 heads of a row or more
    tl.store(claims + index, 0, mask=index < counters)


@triton.jit
def _softmax(x, k, v, visible, factor, cap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Maximum (log2) and sum of the softmax of x over the tokens that are visible, and un-normalised output."""
    s = tl.dot(x, tl.trans(k), input_precision=PRECISION) * factor
    if SOFTCAP:
        s = softcapped(s, cap)
    s = tl.where(visible, s, float("-inf"))
    m = tl.maximum(tl.max(s, axis=1), -1e30)
    p = tl.exp2(s - m[:, None])
    if PRECISION == "tf32":  # what the product below sees, so that it and the sum agree
        p = (p.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return m, tl.sum(p, axis=1), tl.dot(p, v, input_precision=PRECISION)


@triton.jit
def _attend_exact(
    pid, q, k_sinks, v_sinks, k_recent, v_recent, length, start, exact_o, exact_ml,
    stride_qb, stride_qh, stride_sb, stride_sh, stride_rb, stride_rh,
    heads, sinks, window, capacity, chunks, factor, cap,
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
    m, l, o = _softmax(x, k, v, live[None, :], factor, cap, SOFTCAP, PRECISION)
    q_row = ((bh * chunks + chunk) * G + head).to(tl.int64)
    tl.store(exact_ml + 2 * q_row, m, mask=has_head)
    tl.store(exact_ml + 2 * q_row + 1, l, mask=has_head)
    tl.store(exact_o + q_row[:, None] * D + dims[None, :], o, mask=has_head[:, None] & in_dim)


@triton.jit
def _attend_new(
    pid, q, k_new, v_new, length, start, exact_o, exact_ml, stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, heads, group, q_len, chunks, factor, cap,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SOFTCAP: tl.constexpr, NEW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of 16 of a KV head's G rows to its at most NEW new tokens: exact part `chunks`, after the window's."""
    BLOCKS: tl.constexpr = (G + 15) // 16
    bh = (pid // BLOCKS).to(tl.int64)
    b = bh // heads
    h = bh % heads
    row = pid % BLOCKS * 16 + tl.arange(0, 16)
    given = row < group * q_len
    query = row % q_len
    token = tl.arange(0, NEW)
    skip = tl.load(start + b) - tl.load(length)  # padding among the new tokens, if positive
    visible = (token[None, :] <= query[:, None]) & given[:, None] & (token >= skip)[None, :]
    dims = tl.arange(0, DP)
    in_dim = (dims < D)[None, :]
    at_q = b * stride_qb + (h * group + row // q_len)[:, None] * stride_qh + query.to(tl.int64)[:, None] * stride_qn
    x = tl.load(q + at_q + dims[None, :], mask=given[:, None] & in_dim, other=0.0).to(tl.float32)
    at = token.to(tl.int64)[:, None]
    wanted = ((token < q_len) & (token >= skip))[:, None] & in_dim
    k = tl.load(k_new + b * stride_kb + h * stride_kh + at * stride_kn + dims[None, :], mask=wanted, other=0.0)
    v = tl.load(v_new + b * stride_vb + h * stride_vh + at * stride_vn + dims[None, :], mask=wanted, other=0.0)
    m, l, o = _softmax(x, k.to(tl.float32), v.to(tl.float32), visible, factor, cap, SOFTCAP, PRECISION)
    # Outputs may be stored in 16 bits: those of mass 1 are no larger than the values.
    m = tl.where(l == 0, m, m + tl.log2(l))
    o *= tl.where(l == 0, 0.0, 1.0 / l)[:, None]
    to = (bh * (chunks + 1) + chunks) * G + row
    tl.store(exact_ml + 2 * to, m, mask=row < G)
    tl.store(exact_ml + 2 * to + 1, tl.where(l == 0, 0.0, 1.0), mask=row < G)
    tl.store(exact_o + to[:, None] * D + dims[None, :], o, mask=(row < G)[:, None] & in_dim)


@triton.jit(do_not_specialize=["batch", "chunks", "counters"])
def prepare_kernel(
    q, k_sinks, v_sinks, k_recent, v_recent, length, start, query_map, key_shift, rotated, bias, claims, exact_o,
    exact_ml,
    stride_qb, stride_qh, stride_sb, stride_sh, stride_rb, stride_rh,
    batch, heads, counters, sinks, window, capacity, chunks, factor, inverse_unit, cap,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, COLUMNS: tl.constexpr, OPERAND: tl.constexpr,
    SOFTCAP: tl.constexpr, EXACT: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """See the module docstring.

    rotated: float32 [B * Hq, D]; bias: float32 [B * Hq]; exact_o: float32 [B * H, chunks, G, D]; exact_ml: float32
    [B * H, chunks, G, 2]; claims: int32 [counters], set to zero.
    factor = scale * log2(e), times 2 / cap under a soft-cap.  PRECISION: of products of exact tokens, "tf32" for 16-bit
    ones, "tf32x3", or "ieee", for chips without tf32, which is then that of the map, too.
    """
    pid = tl.program_id(0)
    maps = heads * ((batch * G + 15) // 16) * (D // COLUMNS)
    if pid < maps:
        _prepare(
            pid, q, length, start, query_map, key_shift, rotated, bias, claims, stride_qb, stride_qh, 0, batch, heads,
            G, 1, counters, factor, inverse_unit, G, D, DP, COLUMNS, OPERAND, PRECISION, PDL, False,
        )  # fmt: skip
    elif EXACT:
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        _attend_exact(
            pid - maps, q, k_sinks, v_sinks, k_recent, v_recent, length, start, exact_o, exact_ml,
            stride_qb, stride_qh, stride_sb, stride_sh, stride_rb, stride_rh,
            heads, sinks, window, capacity, chunks, factor, cap, G, D, DP, SOFTCAP, CHUNK, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "chunks", "counters", "group", "q_len"])
def prepare_few_kernel(
    q, k_new, v_new, length, start, query_map, key_shift, rotated, bias, claims, exact_o, exact_ml,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    batch, heads, group, q_len, counters, chunks, factor, inverse_unit, cap,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, COLUMNS: tl.constexpr, OPERAND: tl.constexpr,
    SOFTCAP: tl.constexpr, NEW: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """prepare_kernel of q [B, Hq, q_len, D], whose queries are the first group * q_len of G rows of a KV head.

    k_new, v_new: [B, H, q_len, D], q_len <= NEW.  exact_o: [B * H, chunks + 1, G, D]; exact_ml likewise.
    """
    pid = tl.program_id(0)
    maps = heads * ((batch * G + 15) // 16) * (D // COLUMNS)
    if pid < maps:
        _prepare(
            pid, q, length, start, query_map, key_shift, rotated, bias, claims, stride_qb, stride_qh, stride_qn, batch,
            heads, group, q_len, counters, factor, inverse_unit, G, D, DP, COLUMNS, OPERAND, PRECISION, PDL, True,
        )  # fmt: skip
    else:
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        _attend_new(
            pid - maps, q, k_new, v_new, length, start, exact_o, exact_ml, stride_qb, stride_qh, stride_qn,
            stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, heads, group, q_len, chunks, factor, cap,
            G, D, DP, SOFTCAP, NEW, PRECISION,
        )  # fmt: skip
