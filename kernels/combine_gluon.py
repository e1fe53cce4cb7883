"""combine.py with every layout chosen by hand (Gluon, sm_80 and newer): the tail of each decode step.

Same formula and grid.  Partial outputs of splits have their dimensions in the order of `exact_gluon.store_part`, which
the rows of the map take on their way to shared memory.  A warp holds PARTS partial results of 1 / WD of the dimensions
of one query at a time, so that merging them exchanges nothing between warps; the output map waits in shared memory,
copied while the splits end; the product with it is plain float32 multiply-adds, which is fewer instructions than
tensor-core operands would take to build.  Block: R warps over queries times WD over dimensions.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .gluon_basics import async_load, barrier, launch_next, wait_for_previous

LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _load_parts(p_o, p_ml, rows, base, live, parts, first, part, dims, G: gl.constexpr, D: gl.constexpr):
    """Maximum and mass [P, R], output [P, R, dims] of parts first + part [P] of R queries.

    base, live [R]: the queries' entry of part 0, and whether they exist.  Outputs of empty parts are loaded but masked
    later, so that no load waits for another.
    """
    inside = live[None, :] & (first + part < parts)[:, None]
    at = base[None, :] + (first + part)[:, None] * G
    l = gl.load(p_ml + rows + at, mask=inside, other=0.0)
    m = gl.load(p_ml + at, mask=inside, other=-1e30)
    o = gl.load(
        p_o + at[:, :, None] * D + dims[None, None, :], mask=inside[:, :, None] & (dims < D)[None, None, :], other=0.0
    )
    return gl.where(l == 0.0, -1e30, m), l, o.to(gl.float32)


@gluon.jit
def _weighted(m, l, o, top):
    """Mass and output of every part relative to 2 ** top, which broadcasts to m."""
    weight = gl.where(l == 0.0, 0.0, gl.exp2(m - top))
    return weight * l, gl.where((l == 0.0)[:, :, None], 0.0, o * weight[:, :, None])


@gluon.jit
def _merge(
    p_o, p_ml, rows, base, live, parts, part, dims, G: gl.constexpr, D: gl.constexpr, P: gl.constexpr,
    MORE: gl.constexpr,
):  # fmt: skip
    """All parts, folded modulo P: maximum and mass [P, R], output [P, R, dims]."""
    m, l, o = _load_parts(p_o, p_ml, rows, base, live, parts, 0, part, dims, G, D)
    if MORE:
        l, o = _weighted(m, l, o, m)
        for first in range(P, parts, P):
            m_next, l_next, o_next = _load_parts(p_o, p_ml, rows, base, live, parts, first, part, dims, G, D)
            top = gl.maximum(m, m_next)
            l_next, o_next = _weighted(m_next, l_next, o_next, top)
            old = gl.exp2(m - top)
            l = l * old + l_next
            o = o * old[:, :, None] + o_next
            m = top
    return m, l, o


@gluon.jit(do_not_specialize=["batch", "splits", "chunks"])
def combine_gluon_kernel(
    split_o, split_ml, exact_o, exact_ml, output_map, value_shift, sink_logits, out,
    batch, heads, splits, chunks,
    G: gl.constexpr, D: gl.constexpr, DP: gl.constexpr, COLUMNS: gl.constexpr, R: gl.constexpr, WD: gl.constexpr,
    PARTS: gl.constexpr, MORE: gl.constexpr, E_PARTS: gl.constexpr, E_MORE: gl.constexpr, HAS_SINK: gl.constexpr,
    PDL: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """combine.combine_kernel; at a time R queries, PARTS of their splits, E_PARTS of their chunks (MORE: not all)."""
    LANES: gl.constexpr = DP // (4 * WD) if DP < 128 * WD else 32  # over dimensions, the others over partial results
    E_LANES: gl.constexpr = COLUMNS // (4 * WD) if COLUMNS < 128 * WD else 32
    C_LANES: gl.constexpr = COLUMNS // 4 if COLUMNS < 128 else 32
    K_LANES: gl.constexpr = 32 // C_LANES
    K_WIDE: gl.constexpr = num_warps * K_LANES
    K_MOST: gl.constexpr = 4 if R > 4 else 8
    K_EACH: gl.constexpr = K_MOST if K_WIDE * K_MOST <= DP else DP // K_WIDE
    gl.static_assert(K_EACH > 0 and DP % (K_WIDE * K_EACH) == 0, "more warps than the product has rows for")
    EACH: gl.constexpr = PARTS * LANES // 32 if PARTS * LANES > 32 else 1
    E_EACH: gl.constexpr = E_PARTS * E_LANES // 32 if E_PARTS * E_LANES > 32 else 1
    F_EACH: gl.constexpr = K_WIDE * E_LANES // 32 if K_WIDE * E_LANES > 32 else 1
    L_S: gl.constexpr = gl.BlockedLayout([EACH, 1, 4], [32 // LANES, 1, LANES], [1, R, WD], [2, 1, 0])
    L_E: gl.constexpr = gl.BlockedLayout([E_EACH, 1, 4], [32 // E_LANES, 1, E_LANES], [1, R, WD], [2, 1, 0])
    L_F: gl.constexpr = gl.BlockedLayout([F_EACH, 1, 4], [32 // E_LANES, 1, E_LANES], [1, R, WD], [2, 1, 0])
    L_C: gl.constexpr = gl.BlockedLayout([1, 4], [K_LANES, C_LANES], [num_warps, 1], [1, 0])
    # [R, K_WIDE, K_EACH, COLUMNS] of the product: sums over K_EACH stay in a thread
    L_P: gl.constexpr = gl.BlockedLayout(
        [R, 1, K_EACH, 4], [1, K_LANES, 1, C_LANES], [1, num_warps, 1, 1], [3, 2, 1, 0]
    )
    S2: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    S3: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])

    h = gl.program_id(0).to(gl.int64)
    first_query = gl.program_id(1) * R
    first_column = gl.program_id(2) * COLUMNS
    # What does not depend on the splits comes first: under PDL this launch begins while they end.
    map_s = gl.allocate_shared_memory(gl.float32, [DP, COLUMNS], S2)
    k = gl.arange(0, DP, gl.SliceLayout(1, L_C))
    c = first_column + gl.arange(0, COLUMNS, gl.SliceLayout(0, L_C))
    QD: gl.constexpr = D if D == DP else 32
    row = k // QD * QD + k % (QD // 8) * 8 + k % QD // (QD // 8)
    p_map = output_map + h * D * D + row[:, None] * D + c[None, :]
    if DP == D and D % COLUMNS == 0:
        async_load(map_s, p_map)
    else:
        async_load(map_s, p_map, mask=(k < D)[:, None] & (c < D)[None, :])
    async_copy.commit_group()
    if PDL:
        launch_next()
        wait_for_previous()

    pairs = batch * heads * G
    query = first_query + gl.arange(0, R, gl.SliceLayout(0, gl.SliceLayout(2, L_S)))
    live = query < batch * G
    bh = (query // G).to(gl.int64) * heads + h
    part = gl.arange(0, PARTS, gl.SliceLayout(1, gl.SliceLayout(2, L_S)))
    dims = gl.arange(0, DP, gl.SliceLayout(0, gl.SliceLayout(1, L_S)))
    of_split = bh * splits * G + query % G
    m_s, l_s, o_s = _merge(split_o, split_ml, pairs * splits, of_split, live, splits, part, dims, G, D, PARTS, MORE)
    query_e = first_query + gl.arange(0, R, gl.SliceLayout(0, gl.SliceLayout(2, L_E)))
    live_e = query_e < batch * G
    bh_e = (query_e // G).to(gl.int64) * heads + h
    part_e = gl.arange(0, E_PARTS, gl.SliceLayout(1, gl.SliceLayout(2, L_E)))
    column = first_column + gl.arange(0, COLUMNS, gl.SliceLayout(0, gl.SliceLayout(1, L_E)))
    of_exact = bh_e * chunks * G + query_e % G
    m_e, l_e, o_e = _merge(
        exact_o, exact_ml, pairs * chunks, of_exact, live_e, chunks, part_e, column, G, D, E_PARTS, E_MORE
    )
    top = gl.max(m_s, axis=0)
    top = gl.maximum(top, gl.convert_layout(gl.max(m_e, axis=0), top.type.layout))
    if HAS_SINK:
        sink = gl.load(sink_logits + h * G + query % G, mask=live, other=0.0).to(gl.float32) * LOG2E
        top = gl.maximum(top, sink)
    mass, x = _weighted(m_s, l_s, o_s, top[None, :])
    mass = gl.sum(mass, axis=0)
    x = gl.sum(x, axis=0)
    top_e = gl.convert_layout(top, gl.SliceLayout(0, m_e.type.layout))
    mass_e, y = _weighted(m_e, l_e, o_e, top_e[None, :])
    total = mass + gl.convert_layout(gl.sum(mass_e, axis=0), mass.type.layout)
    y = gl.sum(y, axis=0)
    if HAS_SINK:
        total += gl.exp2(sink - top)
    inverse = gl.where(total == 0.0, 0.0, 1.0 / total)  # NaN stays

    x_s = gl.allocate_shared_memory(gl.float32, [R, DP], S2)
    x_s.store(x)
    async_copy.wait_group(0)
    barrier()
    x3 = x_s.reshape([R, DP // K_EACH, K_EACH])
    map3 = map_s.reshape([DP // K_EACH, K_EACH, COLUMNS])
    acc = gl.zeros([R, K_WIDE, COLUMNS], gl.float32, gl.SliceLayout(2, L_P))
    for i in gl.static_range(DP // (K_WIDE * K_EACH)):
        some = x3.slice(i * K_WIDE, K_WIDE, dim=1).load(gl.SliceLayout(3, L_P))
        rows = map3.slice(i * K_WIDE, K_WIDE, dim=0).load(gl.SliceLayout(0, L_P))
        acc += gl.sum(some[:, :, :, None] * rows[None, :, :, :], axis=2)
    sums = gl.allocate_shared_memory(gl.float32, [K_WIDE, R, COLUMNS], S3, gl.permute(acc, (1, 0, 2)))
    unrotated = gl.sum(sums.load(L_F), axis=0)

    F: gl.constexpr = unrotated.type.layout
    query_f = first_query + gl.arange(0, R, gl.SliceLayout(1, F))
    column_f = first_column + gl.arange(0, COLUMNS, gl.SliceLayout(0, F))
    shift = gl.load(value_shift + h * D + column_f, mask=column_f < D, other=0.0)
    mass_f = gl.convert_layout(mass, gl.SliceLayout(1, F))
    inverse_f = gl.convert_layout(inverse, gl.SliceLayout(1, F))
    y = gl.convert_layout(y, F) + unrotated + mass_f[:, None] * shift[None, :]
    at = (((query_f // G).to(gl.int64) * heads + h) * G + query_f % G)[:, None] * D + column_f[None, :]
    live_f = (query_f < batch * G)[:, None] & (column_f < D)[None, :]
    gl.store(out + at, (y * inverse_f[:, None]).to(out.dtype.element_ty), mask=live_f)
