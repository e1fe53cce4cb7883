"""What comes before and after the flash attention of several queries: mapping them, and merging partial outputs."""

import triton
import triton.language as tl

from .extend_flash import LOG2E, geometry
from .mapped import load_map, map_operands, two_parts


@triton.jit(do_not_specialize=["q_len"])
def rotate_kernel(
    q, rotated, unit, bias, query_map, key_shift, q_sb, q_sh, q_sn, q_sd, heads, group, q_len,
    D: tl.constexpr, DP: tl.constexpr, KC: tl.constexpr, ROWS: tl.constexpr, OPERAND: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """rotated = q @ query_map / unit, unit = its largest entry, bias = q . key_shift.

    Grid: (B * Hq, blocks of ROWS queries).  rotated [B * Hq, q_len, D]; unit, bias float32 [B * Hq, q_len].
    """
    b = (tl.program_id(0) // heads).to(tl.int64)
    hq = (tl.program_id(0) % heads).to(tl.int64)
    h = hq // group
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = row < q_len
    q += b * q_sb + hq * q_sh
    y = tl.zeros([ROWS, DP], tl.float32)
    shifted = tl.zeros([ROWS], tl.float32)
    for first in range(0, DP, KC):
        dims = first + tl.arange(0, KC)
        x = tl.load(q + row[:, None] * q_sn + dims[None, :] * q_sd, mask=ok[:, None] & (dims < D)[None, :], other=0.0)
        x = x.to(tl.float32)
        shifted += tl.sum(x * tl.load(key_shift + h * D + dims, mask=dims < D, other=0.0)[None, :], axis=1)
        x_high, x_low = two_parts(x, OPERAND)
        m_high, m_low = map_operands(load_map(query_map + h * D * D, first, D, DP, KC), OPERAND)
        y = tl.dot(x_low, m_high, y, input_precision="ieee")
        y = tl.dot(x_high, m_low, y, input_precision="ieee")
        y = tl.dot(x_high, m_high, y, input_precision="ieee")
    top = tl.max(tl.abs(y), axis=1)
    inverse = tl.where(top > 0, 1.0 / top, 0.0)
    dims = tl.arange(0, DP)
    at = tl.program_id(0).to(tl.int64) * q_len + row
    out = (y * inverse[:, None]).to(rotated.dtype.element_ty)
    tl.store(rotated + at[:, None] * D + dims[None, :], out, mask=ok[:, None] & (dims < D)[None, :])
    tl.store(unit + at, top, mask=ok)
    tl.store(bias + at, shifted, mask=ok)
    if PDL:  # needs nothing of the launch before, but ends after it, so that later ones find its results
        tl.extra.cuda.gdc_wait()


@triton.jit(do_not_specialize=["q_len"])
def merge_kernel(
    o_exact, lse_exact, o_packed, lse_packed, sink_logits, out, output_map, value_shift, length, start,
    heads, group, q_len, splits, capacity, sinks, window,
    D: tl.constexpr, DP: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, TOGETHER: tl.constexpr,
    LOGITS: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """out = w_exact o_exact + (sum_s w_s o_s) @ output_map + (sum_s w_s) value_shift; zeros for padding queries.

    Grid: (B * Hq, blocks of ROWS queries).  out [B * Hq, q_len, D] contiguous.
    """
    b = (tl.program_id(0) // heads).to(tl.int64)
    hq = (tl.program_id(0) % heads).to(tl.int64)
    h = hq // group
    skip, _, _ = geometry(length, start, b, q_len, sinks, window, capacity)
    i = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = i < q_len
    at = tl.program_id(0).to(tl.int64) * q_len + i
    split = tl.num_programs(0).to(tl.int64) * q_len
    top = tl.load(lse_exact + at, mask=ok, other=float("-inf"))
    exact = top
    if LOGITS:
        logit = tl.load(sink_logits + hq).to(tl.float32) * LOG2E
        top = tl.maximum(top, logit)
    for s in range(splits):
        top = tl.maximum(top, tl.load(lse_packed + s * split + at, mask=ok, other=float("-inf")))
    top = tl.where(top == float("-inf"), 0.0, top)
    w_exact = tl.exp2(exact - top)
    mass = tl.zeros([ROWS], tl.float32)
    for s in range(splits):
        mass += tl.exp2(tl.load(lse_packed + s * split + at, mask=ok, other=float("-inf")) - top)
    total = w_exact + mass
    if LOGITS:
        total += tl.exp2(logit - top)
    share = tl.where((total == 0) | (i < skip), 0.0, 1.0 / total)  # NaN stays

    dims = tl.arange(0, DP)
    inside = ok[:, None] & (dims < D)[None, :]
    x = tl.zeros([ROWS, DP], tl.float32)
    for s in tl.range(0, splits, loop_unroll_factor=TOGETHER):
        weight = tl.exp2(tl.load(lse_packed + s * split + at, mask=ok, other=float("-inf")) - top) * share
        x += tl.load(o_packed + (s * split + at)[:, None] * D + dims[None, :], mask=inside, other=0.0) * weight[:, None]
    x_high, x_low = two_parts(x, OPERAND)
    for first in range(0, DP, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        ok_map = (dims < D)[:, None] & (column < D)[None, :]
        part = tl.load(output_map + h * D * D + dims[:, None] * D + column[None, :], mask=ok_map, other=0.0)
        m_high, m_low = map_operands(part, OPERAND)
        wanted = ok[:, None] & (column < D)[None, :]
        o = tl.load(o_exact + at[:, None] * D + column[None, :], mask=wanted, other=0.0) * (w_exact * share)[:, None]
        o += (mass * share)[:, None] * tl.load(value_shift + h * D + column, mask=column < D, other=0.0)[None, :]
        o = tl.dot(x_low, m_high, o, input_precision="ieee")
        o = tl.dot(x_high, m_low, o, input_precision="ieee")
        o = tl.dot(x_high, m_high, o, input_precision="ieee")
        tl.store(out + at[:, None] * D + column[None, :], o.to(out.dtype.element_ty), mask=wanted)
