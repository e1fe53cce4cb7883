"""Merge the splits of a decode step, un-rotate the packed part once, add the exact part.

    M    = max over splits m_s, exact m_e, sink logit        w_i = 2 ** (m_i - M)
    mass = sum_s w_s l_s          total = mass + w_e l_e + 2 ** (sink - M)
    out  = ((sum_s w_s o_s) @ output_map + mass * value_shift + w_e o_e) / total

Grid: (batch * KV heads, blocks of R of its query heads).  Block: R heads, splits taken SLOTS / R at a time.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def combine_kernel(
    split_o, split_ml, exact_o, exact_ml, output_map, value_shift, sink_logits, out,
    heads, splits,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, SLOTS: tl.constexpr,
    HAS_SINK: tl.constexpr,
):  # fmt: skip
    """See the module docstring.

    split_o: float32 [B * H, splits, G, D], overwritten at split 0 with the merged sum; split_ml: float32
    [2, B * H, splits, G], a split without tokens has l = 0 and an unwritten o; exact_o [B * H * G, D];
    exact_ml [2, B * H * G]; out: [B * H * G, D] in the query's dtype.
    """
    SPLITS: tl.constexpr = SLOTS // R
    bh = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * R
    h = bh % heads
    total_ml = tl.num_programs(0).to(tl.int64) * splits * G
    rows = tl.num_programs(0).to(tl.int64) * G
    dims = tl.arange(0, DP)
    in_dim = dims < D

    slot = tl.arange(0, SLOTS)
    s_slot = slot // R
    g_slot = first + slot % R
    p_ml = split_ml + bh * splits * G
    top = tl.full([SLOTS], -1e30, tl.float32)
    for s in range(0, splits, SPLITS):
        live = (s + s_slot < splits) & (g_slot < G)
        at = (s + s_slot) * G + g_slot
        l = tl.load(p_ml + total_ml + at, mask=live, other=0.0)
        m = tl.load(p_ml + at, mask=live & (l > 0.0), other=-1e30)
        top = tl.maximum(top, m)
    # [R]
    top_r = tl.max(tl.reshape(top, [SPLITS, R]), axis=0)
    head = first + tl.arange(0, R)
    has_head = head < G
    q_row = bh * G + head
    m_exact = tl.load(exact_ml + q_row, mask=has_head, other=-1e30)
    l_exact = tl.load(exact_ml + rows + q_row, mask=has_head, other=0.0)
    top_r = tl.maximum(top_r, m_exact)
    if HAS_SINK:
        sink = tl.load(sink_logits + h * G + head, mask=has_head, other=0.0).to(tl.float32) * LOG2E
        top_r = tl.maximum(top_r, sink)

    top_slot = tl.reshape(tl.broadcast_to(top_r[None, :], [SPLITS, R]), [SLOTS])
    acc = tl.zeros([SLOTS, DP], tl.float32)
    mass_slot = tl.zeros([SLOTS], tl.float32)
    for s in range(0, splits, SPLITS):
        live = (s + s_slot < splits) & (g_slot < G)
        at = (s + s_slot) * G + g_slot
        l = tl.load(p_ml + total_ml + at, mask=live, other=0.0)
        live = live & (l > 0.0)
        w = tl.exp2(tl.load(p_ml + at, mask=live, other=-1e30) - top_slot)
        mass_slot += w * l
        p_o = split_o + (bh * splits * G + at)[:, None] * D + dims[None, :]
        acc += w[:, None] * tl.load(p_o, mask=live[:, None] & in_dim[None, :], other=0.0)
    mass = tl.sum(tl.reshape(mass_slot, [SPLITS, R]), axis=0)
    merged = tl.sum(tl.reshape(acc, [SPLITS, R, DP]), axis=0)

    # The product needs slices of `merged`, which registers cannot give: through memory this program alone uses.
    p_merged = split_o + bh * splits * G * D
    tl.store(p_merged + head[:, None] * D + dims[None, :], merged, mask=has_head[:, None] & in_dim[None, :])
    tl.debug_barrier()
    row = tl.arange(0, 16)
    in_block = (row < R) & (first + row < G)
    y = tl.zeros([16, DP], tl.float32)
    for k in range(0, D, 32):
        inner = k + tl.arange(0, 32)
        x_k = tl.load(p_merged + (first + row)[:, None] * D + inner[None, :], mask=in_block[:, None], other=0.0)
        p_map = output_map + h * D * D + inner[:, None] * D + dims[None, :]
        y += tl.dot(x_k, tl.load(p_map, mask=in_dim[None, :], other=0.0), input_precision="tf32x3")

    # From R to the 16 rows of the product.
    w_exact = tl.exp2(m_exact - top_r)
    total = mass + w_exact * l_exact
    if HAS_SINK:
        total += tl.exp2(sink - top_r)
    inverse = tl.where(total > 0.0, 1.0 / total, 0.0)
    same = row[:, None] == tl.arange(0, R)[None, :]
    mass_row = tl.sum(tl.where(same, (mass * inverse)[None, :], 0.0), axis=1)
    exact_row = tl.sum(tl.where(same, (w_exact * inverse)[None, :], 0.0), axis=1)
    inverse_row = tl.sum(tl.where(same, inverse[None, :], 0.0), axis=1)

    write = in_block[:, None] & in_dim[None, :]
    at_out = (bh * G + first + row)[:, None] * D + dims[None, :]
    exact = tl.load(exact_o + at_out, mask=write, other=0.0)
    shift = tl.load(value_shift + h * D + dims, mask=in_dim, other=0.0)
    y = y * inverse_row[:, None] + mass_row[:, None] * shift[None, :] + exact_row[:, None] * exact
    tl.store(out + at_out, y.to(out.dtype.element_ty), mask=write)
