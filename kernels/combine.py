"""Merge the splits of a decode step, un-rotate the packed part once, add the exact part.

    M    = max over splits m_s, exact chunks m_e, sink logit        w_i = 2 ** (m_i - M)
    mass = sum_s w_s l_s          total = mass + sum_e w_e l_e + 2 ** (sink - M)
    out  = ((sum_s w_s o_s) @ output_map + mass * value_shift + sum_e w_e o_e) / total

Grid: (KV heads, blocks of R of that head's B * G queries, blocks of COLUMNS dimensions).  Block: R queries, SLOTS / R
partial results at a time.  The product with the map runs on tensor cores in two bf16 parts (17 bits each; under the
interpreter, whose bf16 product is wrong, the same parts are multiplied as float32).
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _part(p_o, p_ml, rows, base, live, parts, s, dims, G: tl.constexpr, D: tl.constexpr, R: tl.constexpr):
    """Maximum and mass [SLOTS], output [SLOTS, dims] of parts s, s + 1, ... of R queries, R slots to a part.

    base [SLOTS]: the queries' entry of part 0.  Outputs of empty parts are loaded but masked later, so that no load
    waits for another.
    """
    part = s + tl.arange(0, base.shape[0]) // R
    inside = live & (part < parts)
    at = base + part * G
    l = tl.load(p_ml + rows + at, mask=inside, other=0.0)
    m = tl.load(p_ml + at, mask=inside, other=-1e30)
    o = tl.load(p_o + at[:, None] * D + dims[None, :], mask=inside[:, None] & (dims < D)[None, :], other=0.0)
    return tl.where(l > 0.0, m, -1e30), l, o


@triton.jit
def _accumulate(top, mass, acc, m, l, o):
    """Online softmax, slot by slot."""
    new = tl.maximum(top, m)
    old_weight = tl.exp2(top - new)
    weight = tl.where(l > 0.0, tl.exp2(m - new), 0.0)
    mass = mass * old_weight + weight * l
    acc = acc * old_weight[:, None] + tl.where((l > 0.0)[:, None], weight[:, None] * o, 0.0)
    return new, mass, acc


@triton.jit
def _reduce(x, top, slots, R: tl.constexpr):
    """Sum over the slots of R queries of x [SLOTS, ...] weighted with 2 ** (slots - top): [R, ...]."""
    PARTS: tl.constexpr = slots.shape[0] // R
    weight = tl.exp2(tl.reshape(slots, [PARTS, R]) - top[None, :])
    if len(x.shape) == 1:
        total = tl.sum(tl.reshape(x, [PARTS, R]) * weight, axis=0)
    else:
        total = tl.sum(tl.reshape(x, [PARTS, R, x.shape[1]]) * weight[:, :, None], axis=0)
    return total


@triton.jit
def _two_parts(x, OPERAND: tl.constexpr):
    """float32 as the nearest bf16 and what is left, both dot operands."""
    high = x.to(tl.bfloat16)
    return high.to(OPERAND), (x - high.to(tl.float32)).to(tl.bfloat16).to(OPERAND)


@triton.jit
def combine_kernel(
    split_o, split_ml, exact_o, exact_ml, output_map, value_shift, sink_logits, out,
    batch, heads, splits, chunks,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, COLUMNS: tl.constexpr, R: tl.constexpr, SLOTS: tl.constexpr,
    MORE: tl.constexpr, HAS_SINK: tl.constexpr, OPERAND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """See the module docstring.

    split_o: float32 [B * H, splits, G, D], split_ml: float32 [2, B * H, splits, G], a split without tokens has l = 0
    and an unwritten o; exact_o, exact_ml: the same with chunks for splits; out: [B * H * G, D] in the query's dtype.
    MORE: there are more than SLOTS / R splits or chunks.
    """
    h = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * R
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    in_column = column < D
    dims = tl.arange(0, DP)
    # What does not depend on the splits comes first: under PDL this launch begins while they end.
    inside = (dims < D)[:, None] & in_column[None, :]
    map = tl.load(output_map + h * D * D + dims[:, None] * D + column[None, :], mask=inside, other=0.0)
    map_high, map_low = _two_parts(map, OPERAND)
    shift = tl.load(value_shift + h * D + column, mask=in_column, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    query = first + tl.arange(0, SLOTS) % R
    live_row = query < batch * G
    bh = (query // G).to(tl.int64) * heads + h
    pairs = tl.cast(batch, tl.int64) * heads * G
    base_s = bh * splits * G + query % G
    base_e = bh * chunks * G + query % G

    mine = first + tl.arange(0, R)
    has = mine < batch * G
    m_split, l_split, o_split = _part(split_o, split_ml, pairs * splits, base_s, live_row, splits, 0, dims, G, D, R)
    m_exact, l_exact, o_exact = _part(exact_o, exact_ml, pairs * chunks, base_e, live_row, chunks, 0, column, G, D, R)
    o_split = tl.where((l_split > 0.0)[:, None], o_split, 0.0)
    o_exact = tl.where((l_exact > 0.0)[:, None], o_exact, 0.0)
    if MORE:
        for s in range(SLOTS // R, tl.maximum(splits, chunks), SLOTS // R):
            m_s, l_s, o_s = _part(split_o, split_ml, pairs * splits, base_s, live_row, splits, s, dims, G, D, R)
            m_e, l_e, o_e = _part(exact_o, exact_ml, pairs * chunks, base_e, live_row, chunks, s, column, G, D, R)
            m_split, l_split, o_split = _accumulate(m_split, l_split, o_split, m_s, l_s, o_s)
            m_exact, l_exact, o_exact = _accumulate(m_exact, l_exact, o_exact, m_e, l_e, o_e)
    top = tl.max(tl.reshape(tl.maximum(m_split, m_exact), [SLOTS // R, R]), axis=0)
    if HAS_SINK:
        sink = tl.load(sink_logits + h * G + mine % G, mask=has, other=0.0).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    mass, o = _reduce(l_split, top, m_split, R), _reduce(o_split, top, m_split, R)
    mass_exact, y = _reduce(l_exact, top, m_exact, R), _reduce(o_exact, top, m_exact, R)
    total = mass + mass_exact
    if HAS_SINK:
        total += tl.exp2(sink - top)
    inverse = tl.where(total > 0.0, 1.0 / total, 0.0)

    # The product wants 16 rows: repeat the R there are.
    x = tl.reshape(tl.broadcast_to((o * inverse[:, None])[None, :, :], [16 // R, R, DP]), [16, DP])
    x_high, x_low = _two_parts(x, OPERAND)
    unrotated = tl.dot(x_low, map_low, input_precision="ieee")
    unrotated = tl.dot(x_low, map_high, unrotated, input_precision="ieee")
    unrotated = tl.dot(x_high, map_low, unrotated, input_precision="ieee")
    unrotated = tl.dot(x_high, map_high, unrotated, input_precision="ieee")
    unrotated = tl.sum(tl.reshape(unrotated, [16 // R, R, COLUMNS]), axis=0) * (R / 16)
    y = unrotated + (y + mass[:, None] * shift[None, :]) * inverse[:, None]
    at = (((mine // G).to(tl.int64) * heads + h) * G + mine % G)[:, None] * D + column[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=has[:, None] & in_column[None, :])
