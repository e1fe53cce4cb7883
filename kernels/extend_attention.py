"""Attention of several queries per row over packed K and V, the exact window and sinks, and causally over new tokens.

A few queries are left to the kernels of decode_attention.py, which share a long row among more programs; what follows
is for more.

Four launches.  `exact_kernel` is flash attention over sinks, ring and new tokens; beside it `rotate_kernel` maps the
queries once.  `packed_kernel` is flash attention whose K and V operands are unpacked in registers once per block of
query rows (all G query heads of a KV head share a block).  Both attentions leave normalised partial outputs and the
log2 of their softmax sums; `merge_kernel` weighs them, maps the packed part back and adds the value shift:

    out = w_exact o_exact + (sum_s w_s o_s) @ output_map + (sum_s w_s) value_shift

Queries are divided by their largest entry to be safe in fp16, whose 11 bits matter more here than range.  Scales of
keys multiply scores, those of values multiply probabilities.
"""

import torch
import triton
import triton.language as tl

from .chip import launches_early, multiprocessors, shared_kib
from .decode_attention import MAX_PAIRS, few_obstacle, few_queries
from .encode import WIDE, padded_dim
from .levels import level_unit, levels_asm, unpack
from .mapped import load_map, map_operands, two_parts
from .operands import contiguous
from .query import check_queries

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _geometry(length, start, b, q, sinks, window, capacity):
    """Of row b: padding among the q new tokens, tokens in the cache, packed tokens (reference.py)."""
    seen = tl.load(length).to(tl.int64)
    first = tl.load(start + b).to(tl.int64)
    skip = tl.minimum(tl.maximum(first - seen, 0), q)
    n = tl.maximum(seen - first, 0)
    left = tl.maximum(n - sinks - window, 0) // 32 * 32
    packed = tl.where(capacity == 0, tl.maximum(n - sinks, 0), left)
    return skip, n, packed


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
    _, _, packed = _geometry(length, start, b, q_len, sinks, window, capacity)
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
    skip, n, packed = _geometry(length, start, b, q_len, sinks, window, capacity)
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
    skip, _, _ = _geometry(length, start, b, q_len, sinks, window, capacity)
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


def operand_types(dtype: torch.dtype, interpreted: bool) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Dot operand types for packed keys, packed values and exact tokens.  The interpreter's bf16 product is wrong."""
    if dtype == torch.float32 or (interpreted and dtype == torch.bfloat16):
        return torch.float32, torch.float32, torch.float32
    return torch.float16, dtype, dtype


def product_precision(dtype: torch.dtype, dim: int, shared: int, tf32: bool) -> str:
    """Triton's input_precision of products; float32 has three tf32 parts where they fit `shared` KiB.

    tf32: whether the chip multiplies them.
    """
    return "tf32x3" if dtype == torch.float32 and tf32 and (padded_dim(dim) <= 128 or shared >= 160) else "ieee"


_TL = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def launch_options(
    dim: int, rows: int, dtype: torch.dtype, shared: int, small_grid: bool = False
) -> dict[str, dict[str, int]]:
    """Block sizes of the four kernels for `rows` = G * q_len query rows per KV head.

    shared: KiB of shared memory in a multiprocessor.  small_grid: blocks of 128 rows would leave multiprocessors idle.
    """
    padded, wide = padded_dim(dim), shared >= WIDE
    small = padded <= 128
    both = {"ROWS": 32 if small else 16, "num_warps": 4, "num_stages": 1}
    merge = {**both, "COLUMNS": 64 if small else 32, "TOGETHER": 4 if small else 2}
    ends = {"rotate": {**both, "KC": 32}, "merge": merge}
    m = min(128, max(16, triton.next_power_of_2(rows)))
    if dtype == torch.float32:
        block = {"M": 16, "num_warps": 4, "num_stages": 1}
        return {**ends, "packed": {**block, "TILES": 1}, "exact": {**block, "N": 32}}
    if padded > 128 or not wide:
        m = min(m, 64 if padded <= 256 or shared >= 160 else 32)
    if wide:
        packed = {"M": min(m, 64), "TILES": 4 if padded <= 128 else 2, "num_warps": 4, "num_stages": 2}
    else:  # fewer registers hold one tile when the operands of mma.sync come from them
        narrow = padded <= 64
        packed = {"M": min(m, 64 if narrow else 32), "TILES": 2 if narrow else 1, "num_warps": 4, "num_stages": 2}
    if small_grid:
        m = min(m, 64)
    exact = {"M": m, "N": 64 if padded <= 128 and not small_grid else 32, "num_warps": 8 if m == 128 else 4}
    stages = 3 if padded <= 128 and wide else 2 if padded <= 256 or shared >= 160 else 1
    return {**ends, "packed": packed, "exact": {**exact, "num_stages": stages}}


def extend_attention(
    q: torch.Tensor, k_new: torch.Tensor, v_new: torch.Tensor,
    k_codes: torch.Tensor, k_scales: torch.Tensor, v_codes: torch.Tensor, v_scales: torch.Tensor,
    k_sinks: torch.Tensor, v_sinks: torch.Tensor, k_recent: torch.Tensor, v_recent: torch.Tensor,
    length: torch.Tensor, start: torch.Tensor, query_map: torch.Tensor, key_shift: torch.Tensor,
    output_map: torch.Tensor, value_shift: torch.Tensor, window: int, scale: float, softcap: float,
    sink_logits: torch.Tensor | None, k_bits: int, v_bits: int, impl: str = "auto",
) -> torch.Tensor:  # fmt: skip
    """Attention of q [B, Hq, q_len, D] over a packed cache of `length` tokens and causally over k_new, v_new.

    Arguments and result are those of `reference.attention`.  For few queries what `decode_attention` says of large and
    small values and of rounding holds, and for k_new and v_new as for the ring.

    Args:
        k_bits, v_bits: code widths of k_codes and v_codes.
        impl: "gluon" (`decode_attention.few_queries`: few queries, NVIDIA GPUs), "triton" (any number of queries),
            "auto": the first that takes them.

    Raises:
        ValueError: queries of another number of rows or heads, strides that a kernel cannot follow, an unknown impl, or
            impl="gluon" where it does not run.
    """
    batch, q_heads, q_len, dim = q.shape
    check_queries(q, k_codes)
    if not q.numel():
        return torch.empty_like(q)
    if impl not in ("auto", "gluon", "triton"):
        raise ValueError(f"expected impl 'auto', 'gluon' or 'triton', got {impl!r}")
    heads, capacity, sinks = k_codes.shape[1], k_recent.shape[2], k_sinks.shape[2]
    group = q_heads // heads
    if batch * heads > MAX_PAIRS:
        raise ValueError(
            f"expected at most {MAX_PAIRS} pairs of row and KV head, got {batch} x {heads}; split the batch"
        )
    if (k_sinks.stride() != v_sinks.stride() and sinks) or (k_recent.stride() != v_recent.stride() and capacity):
        raise ValueError("expected sinks (and rings) of keys and values to have equal strides; allocate them alike")
    if any(t.stride(-1) != 1 for t in (k_codes, v_codes, k_scales, v_scales)):
        raise ValueError("expected codes and scales contiguous along their last dimension; call .contiguous() on them")
    exact = (k_sinks, v_sinks, k_recent, v_recent)
    obstacle = few_obstacle(q, (k_codes, k_scales, v_codes, v_scales), exact)
    if impl == "gluon" and obstacle:
        raise ValueError(f"impl='gluon' does not run here: {obstacle}; use impl='triton'")
    if impl != "triton" and obstacle is None:
        return few_queries(
            q, k_new, v_new, k_codes, k_scales, v_codes, v_scales, *exact, length, start, query_map, key_shift,
            output_map, value_shift, window, scale, softcap, sink_logits,
            k_bits=k_bits, v_bits=v_bits,
        )  # fmt: skip
    interpreted = triton.knobs.runtime.interpret
    k_type, v_type, exact_type = operand_types(q.dtype, interpreted)
    asm = not interpreted and torch.version.hip is None
    precision = product_precision(q.dtype, dim, shared_kib(q.device), tf32=asm)
    split_operand = tl.float32 if interpreted else tl.bfloat16
    padded = padded_dim(dim)
    cores = multiprocessors(q.device)
    small_grid = triton.cdiv(group * q_len, 128) * batch * heads < cores
    options = launch_options(dim, group * q_len, q.dtype, shared_kib(q.device), small_grid)
    k_words, v_words = k_codes.view(torch.int32), v_codes.view(torch.int32)
    query_map, output_map = query_map.contiguous(), output_map.contiguous()
    key_shift, value_shift = key_shift.contiguous(), value_shift.contiguous()
    start, sink_logits = start.contiguous(), contiguous(sink_logits)

    def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    # The first two launches run side by side: programmatic dependent launch, sm_90.
    pdl = launches_early(q.device)
    per_head = (batch * q_heads, triton.cdiv(q_len, options["merge"]["ROWS"]))
    rotated, unit, bias = buffer(batch, q_heads, q_len, dim, dtype=k_type), buffer(*q.shape[:3]), buffer(*q.shape[:3])
    o_exact, lse_exact = buffer(*q.shape), buffer(*q.shape[:3])
    exact_kernel[(triton.cdiv(group * q_len, options["exact"]["M"]), batch * heads)](
        q, k_new, v_new, k_sinks, v_sinks, k_recent, v_recent, o_exact, lse_exact, length, start,
        *q.stride(), *k_new.stride(), *v_new.stride(), *k_sinks.stride(), *k_recent.stride(),
        heads, group, q_len, capacity, sinks, window, scale, softcap,
        D=dim, DP=padded, CAP=softcap > 0, OPERAND=_TL[exact_type], PRECISION=precision, PDL=pdl,
        **options["exact"],
    )  # fmt: skip

    rotate_kernel[per_head](
        q, rotated, unit, bias, query_map, key_shift, *q.stride(), q_heads, group, q_len,
        D=dim, DP=padded, OPERAND=split_operand, PDL=pdl, **options["rotate"],
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip

    blocks = triton.cdiv(group * q_len, options["packed"]["M"])
    splits = max(1, min(2 * cores // (blocks * batch * heads), k_codes.shape[2] // 8, 64))
    o_packed, lse_packed = buffer(splits, *q.shape), buffer(splits, *q.shape[:3])
    packed_kernel[(blocks, batch * heads, splits)](
        rotated, unit, bias, k_words, k_scales, v_words, v_scales, o_packed, lse_packed, length, start,
        *k_words.stride()[:3], *k_scales.stride()[:3], *v_words.stride()[:3], *v_scales.stride()[:3],
        heads, group, q_len, capacity, sinks, window, scale, 1 / level_unit(k_bits, k_type, asm),
        1 / level_unit(v_bits, v_type, asm), softcap,
        D=dim, DP=padded, K_BITS=k_bits, V_BITS=v_bits,
        K_ASM=levels_asm(k_bits, True, k_type) if asm else None,
        V_ASM=levels_asm(v_bits, False, v_type) if asm else None,
        CAP=softcap > 0, V_OPERAND=_TL[v_type], PRECISION=precision, **options["packed"],
    )  # fmt: skip

    out = buffer(*q.shape, dtype=q.dtype)
    merge_kernel[per_head](
        o_exact, lse_exact, o_packed, lse_packed, sink_logits, out, output_map, value_shift, length, start,
        q_heads, group, q_len, splits, capacity, sinks, window,
        D=dim, DP=padded, LOGITS=sink_logits is not None, OPERAND=split_operand, **options["merge"],
    )  # fmt: skip
    return out
