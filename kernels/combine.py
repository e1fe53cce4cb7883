"""Merge the splits of a decode step, un-rotate the packed part once, add the exact part.

    M    = max over splits m_s, exact chunks m_e, sink logit        w_i = 2 ** (m_i - M)
    mass = sum_s w_s l_s          total = mass + sum_e w_e l_e + 2 ** (sink - M)
    out  = ((sum_s w_s o_s) @ output_map + mass * value_shift + sum_e w_e o_e) / total

Grid: (KV heads, blocks of R of that head's B * G queries, blocks of COLUMNS dimensions).  Block: R queries, PARTS
partial results at a time.  This version runs on any GPU; combine_gluon.py is the one that is fast.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_parts(p_o, p_ml, base, live, parts, first, dims, G: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr):
    """Maximum and mass [PARTS, R], output [PARTS, R, dims] of parts first, first + 1, ... of R queries.

    base, live [R]: the queries' entry of part 0, and whether they exist.
    """
    part = first + tl.arange(0, PARTS)
    inside = live[None, :] & (part < parts)[:, None]
    at = base[None, :] + part[:, None] * G
    m = tl.load(p_ml + 2 * at, mask=inside, other=-1e30)
    l = tl.load(p_ml + 2 * at + 1, mask=inside, other=0.0)
    o = tl.load(p_o + at[:, :, None] * D + dims[None, None, :], mask=inside[:, :, None] & (dims < D), other=0.0)
    return m, l, o


@triton.jit
def _sum_parts(m, l, o, top):
    """Mass [R] and output [R, dims] relative to 2 ** top [R]."""
    weight = tl.exp2(m - top[None, :])
    return tl.sum(weight * l, axis=0), tl.sum(o * weight[:, :, None], axis=0)


@triton.jit(do_not_specialize=["batch", "splits", "chunks"])
def combine_kernel(
    split_o, split_ml, exact_o, exact_ml, output_map, value_shift, sink_logits, out,
    batch, heads, splits, chunks,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, COLUMNS: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr,
    MORE: tl.constexpr, HAS_SINK: tl.constexpr,
):  # fmt: skip
    """See the module docstring.

    split_o: float32 [B * H, splits, G, D], split_ml: float32 [B * H, splits, G, 2], a split without tokens has
    m = -1e30, l = 0 and o = 0; exact_o, exact_ml: the same with chunks for splits; out: [B * H * G, D] in the query's
    dtype.
    MORE: there are more than PARTS splits or chunks.
    """
    h = tl.program_id(0).to(tl.int64)
    mine = tl.program_id(1) * R + tl.arange(0, R)
    live = mine < batch * G
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    in_column = column < D
    dims = tl.arange(0, DP)
    inside = (dims < D)[:, None] & in_column[None, :]
    map = tl.load(output_map + h * D * D + dims[:, None] * D + column[None, :], mask=inside, other=0.0)
    shift = tl.load(value_shift + h * D + column, mask=in_column, other=0.0)
    bh = (mine // G).to(tl.int64) * heads + h
    of_split = bh * splits * G + mine % G
    of_exact = bh * chunks * G + mine % G
    m_s, l_s, o_s = _load_parts(split_o, split_ml, of_split, live, splits, 0, dims, G, D, PARTS)
    m_e, l_e, o_e = _load_parts(exact_o, exact_ml, of_exact, live, chunks, 0, column, G, D, PARTS)
    top = tl.maximum(tl.max(m_s, axis=0), tl.max(m_e, axis=0))
    if HAS_SINK:
        sink = tl.load(sink_logits + h * G + mine % G, mask=live, other=0.0).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    mass, x = _sum_parts(m_s, l_s, o_s, top)
    mass_exact, y = _sum_parts(m_e, l_e, o_e, top)
    if MORE:
        for s in range(PARTS, tl.maximum(splits, chunks), PARTS):
            m_s, l_s, o_s = _load_parts(split_o, split_ml, of_split, live, splits, s, dims, G, D, PARTS)
            m_e, l_e, o_e = _load_parts(exact_o, exact_ml, of_exact, live, chunks, s, column, G, D, PARTS)
            new = tl.maximum(top, tl.maximum(tl.max(m_s, axis=0), tl.max(m_e, axis=0)))
            old = tl.exp2(top - new)
            mass_s, x_s = _sum_parts(m_s, l_s, o_s, new)
            mass_e, y_e = _sum_parts(m_e, l_e, o_e, new)
            mass, mass_exact = mass * old + mass_s, mass_exact * old + mass_e
            x, y = x * old[:, None] + x_s, y * old[:, None] + y_e
            top = new
    total = mass + mass_exact
    if HAS_SINK:
        total += tl.exp2(sink - top)
    inverse = tl.where(total == 0.0, 0.0, 1.0 / total)  # NaN stays

    y += tl.sum(x[:, :, None] * map[None, :, :], axis=1) + mass[:, None] * shift[None, :]
    at = (((mine // G).to(tl.int64) * heads + h) * G + mine % G)[:, None] * D + column[None, :]
    tl.store(out + at, (y * inverse[:, None]).to(out.dtype.element_ty), mask=live[:, None] & in_column[None, :])
