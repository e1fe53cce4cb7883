"""Merge the splits of a decode step, un-rotate the packed part once, add the exact part.

    M    = max over splits m_s, exact chunks m_e, sink logit        w_i = 2 ** (m_i - M)
    mass = sum_s w_s l_s          total = mass + sum_e w_e l_e + 2 ** (sink - M)
    out  = ((sum_s w_s o_s) @ output_map + mass * value_shift + sum_e w_e o_e) / total

Grid: (KV heads, blocks of R of that head's B * G queries).  Block: R queries, SLOTS / R partial results at a time.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _top(p_ml, rows, base, live_row, parts, G: tl.constexpr, R: tl.constexpr, SLOTS: tl.constexpr):
    """Maximum over the parts of R queries: [R].  base [SLOTS]: the queries' entry of part 0, R to a part."""
    PARTS: tl.constexpr = SLOTS // R
    part = tl.arange(0, SLOTS) // R
    top = tl.full([SLOTS], -1e30, tl.float32)
    for s in range(0, parts, PARTS):
        live = live_row & (s + part < parts)
        at = base + (s + part) * G
        l = tl.load(p_ml + rows + at, mask=live, other=0.0)
        m = tl.load(p_ml + at, mask=live, other=-1e30)
        top = tl.maximum(top, tl.where(l > 0.0, m, -1e30))
    return tl.max(tl.reshape(top, [PARTS, R]), axis=0)


@triton.jit
def _merge(
    p_o, p_ml, rows, base, live_row, parts, top,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Mass [R] and un-normalised output [R, DP] of all parts relative to 2 ** top; empty parts are not read."""
    PARTS: tl.constexpr = SLOTS // R
    part = tl.arange(0, SLOTS) // R
    dims = tl.arange(0, DP)
    top_slot = tl.reshape(tl.broadcast_to(top[None, :], [PARTS, R]), [SLOTS])
    acc = tl.zeros([SLOTS, DP], tl.float32)
    mass = tl.zeros([SLOTS], tl.float32)
    for s in range(0, parts, PARTS):
        live = live_row & (s + part < parts)
        at = base + (s + part) * G
        l = tl.load(p_ml + rows + at, mask=live, other=0.0)
        m = tl.load(p_ml + at, mask=live, other=-1e30)
        live = live & (l > 0.0)
        w = tl.where(live, tl.exp2(m - top_slot), 0.0)
        mass += w * l
        o = tl.load(p_o + at[:, None] * D + dims[None, :], mask=live[:, None] & (dims < D)[None, :], other=0.0)
        acc += w[:, None] * o
    return tl.sum(tl.reshape(mass, [PARTS, R]), axis=0), tl.sum(tl.reshape(acc, [PARTS, R, DP]), axis=0)


@triton.jit
def combine_kernel(
    split_o, split_ml, exact_o, exact_ml, output_map, value_shift, sink_logits, merged, out,
    batch, heads, splits, chunks,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, SLOTS: tl.constexpr, KC: tl.constexpr,
    HAS_SINK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """See the module docstring.

    split_o: float32 [B * H, splits, G, D], split_ml: float32 [2, B * H, splits, G], a split without tokens has l = 0
    and an unwritten o; exact_o, exact_ml: the same with chunks for splits; merged: float32 [2, B * H, G, D], scratch;
    out: [B * H * G, D] in the query's dtype.
    """
    if PDL:  # this launch may begin before the splits are done
        tl.extra.cuda.gdc_wait()
    h = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * R
    query = first + tl.arange(0, SLOTS) % R
    live_row = query < batch * G
    bh = (query // G).to(tl.int64) * heads + h
    pairs = tl.cast(batch, tl.int64) * heads * G
    base_s = bh * splits * G + query % G
    base_e = bh * chunks * G + query % G

    mine = first + tl.arange(0, R)
    has = mine < batch * G
    top = tl.maximum(
        _top(split_ml, pairs * splits, base_s, live_row, splits, G, R, SLOTS),
        _top(exact_ml, pairs * chunks, base_e, live_row, chunks, G, R, SLOTS),
    )
    if HAS_SINK:
        sink = tl.load(sink_logits + h * G + mine % G, mask=has, other=0.0).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    mass, o = _merge(split_o, split_ml, pairs * splits, base_s, live_row, splits, top, G, D, DP, R, SLOTS)
    mass_exact, o_exact = _merge(exact_o, exact_ml, pairs * chunks, base_e, live_row, chunks, top, G, D, DP, R, SLOTS)
    total = mass + mass_exact
    if HAS_SINK:
        total += tl.exp2(sink - top)
    inverse = tl.where(total > 0.0, 1.0 / total, 0.0)

    # The product needs 16 rows and slices of them, which registers cannot give: through memory of this program.
    dims = tl.arange(0, DP)
    in_dim = dims < D
    at = (((mine // G).to(tl.int64) * heads + h) * G + mine % G)[:, None] * D + dims[None, :]
    write = has[:, None] & in_dim[None, :]
    tl.store(merged + at, o * inverse[:, None], mask=write)
    shift = tl.load(value_shift + h * D + dims, mask=in_dim, other=0.0)
    o_exact = (o_exact + mass[:, None] * shift[None, :]) * inverse[:, None]
    tl.store(merged + pairs * D + at, o_exact, mask=write)
    tl.debug_barrier()
    row = tl.arange(0, 16)
    live = (row < R) & (first + row < batch * G)
    to = ((((first + row) // G).to(tl.int64) * heads + h) * G + (first + row) % G)[:, None] * D
    y = tl.load(merged + pairs * D + to + dims[None, :], mask=live[:, None] & in_dim[None, :], other=0.0)
    for k in tl.static_range(0, D, KC):
        inner = k + tl.arange(0, KC)
        x = tl.load(merged + to + inner[None, :], mask=live[:, None], other=0.0)
        part = tl.load(output_map + h * D * D + inner[:, None] * D + dims[None, :], mask=in_dim[None, :], other=0.0)
        y += tl.dot(x, part, input_precision="tf32x3")
    tl.store(out + to + dims[None, :], y.to(out.dtype.element_ty), mask=live[:, None] & in_dim[None, :])
