"""combine.py with every layout chosen by hand (Gluon, sm_80 and newer): the tail of each decode step.

Same formula and grid.  Partial outputs of splits have their dimensions in the order of `exact_gluon.store_part`, which
the rows of the map take when they are loaded.  A warp holds PARTS partial results of 1 / WD of the dimensions of one
query at a time, so that merging them exchanges nothing between warps.  The map arrives while the splits end.  The
product of eight queries or more, of D = 64 to 128, is on tensor cores: a warp has some columns of the map in
registers, as operands in two bf16 parts, and the merged queries in two parts come through shared memory.  Else the map
is in shared memory and the product plain float32 multiply-adds.  Block: R warps over queries times WD over dimensions.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from .gluon_basics import async_load, barrier, launch_next, wait_for_previous

LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _load_parts(p_o, p_ml, base, parts, first, part, dims, G: gl.constexpr, D: gl.constexpr, DP: gl.constexpr):
    """Maximum and mass [P, R], output [P, R, dims] of parts first + part [P] of R queries; base [R]: their part 0."""
    inside = first + part < parts
    at = base[None, :] + (first + part)[:, None] * G
    pair = gl.load(p_ml + at, mask=inside[:, None], other=0)
    m = gl.where(inside[:, None], pair.to(gl.int32).to(gl.float32, bitcast=True), -1e30)
    l = (pair >> 32).to(gl.int32).to(gl.float32, bitcast=True)
    wanted = inside[:, None, None]
    if DP > D:
        wanted = wanted & (dims < D)[None, None, :]
    o = gl.load(p_o + at[:, :, None] * D + dims[None, None, :], mask=wanted, other=0.0)
    return m, l, o.to(gl.float32)


@gluon.jit
def _merge(
    p_o, p_ml, base, parts, part, dims, G: gl.constexpr, D: gl.constexpr, DP: gl.constexpr, P: gl.constexpr,
    MORE: gl.constexpr,
):  # fmt: skip
    """All parts, folded modulo P: maximum and mass [P, R], output [P, R, dims]."""
    m, l, o = _load_parts(p_o, p_ml, base, parts, 0, part, dims, G, D, DP)
    if MORE:
        for first in range(P, parts, P):
            m_next, l_next, o_next = _load_parts(p_o, p_ml, base, parts, first, part, dims, G, D, DP)
            top = gl.maximum(m, m_next)
            old = gl.exp2(m - top)
            new = gl.exp2(m_next - top)
            l = l * old + l_next * new
            o = o * old[:, :, None] + o_next * new[:, :, None]
            m = top
    return m, l, o


@gluon.jit
def _sum_parts(m, l, o, top):
    """Mass [R] and output [R, dims] relative to 2 ** top [R]."""
    weight = gl.exp2(m - top[None, :])
    return gl.sum(weight * l, axis=0), gl.sum(o * weight[:, :, None], axis=0)


@gluon.jit(do_not_specialize=["batch", "splits", "chunks", "group", "q_len"])
def combine_gluon_kernel(
    split_o, split_ml, exact_o, exact_ml, output_map, value_shift, sink_logits, out,
    batch, heads, splits, chunks, group, q_len,
    G: gl.constexpr, D: gl.constexpr, DP: gl.constexpr, COLUMNS: gl.constexpr, R: gl.constexpr, WD: gl.constexpr,
    PARTS: gl.constexpr, MORE: gl.constexpr, E_PARTS: gl.constexpr, E_MORE: gl.constexpr, HAS_SINK: gl.constexpr,
    FEW: gl.constexpr, PDL: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """combine.combine_kernel; at a time R queries, PARTS of their splits, E_PARTS of their chunks (MORE: not all).

    split_o and exact_o in float16, too; split_ml, exact_ml: as int64, a maximum and a mass each.  FEW: of G rows to
    a KV head the first group * q_len are queries, q_len of each of its query heads in turn; out is [B, Hq, q_len, D].
    """
    TENSOR: gl.constexpr = R >= 8 and 8 * num_warps <= COLUMNS and DP <= 128  # the map fits registers
    LANES: gl.constexpr = DP // (4 * WD) if DP < 128 * WD else 32  # over dimensions, the others over partial results
    E_LANES: gl.constexpr = COLUMNS // (4 * WD) if COLUMNS < 128 * WD else 32
    C_LANES: gl.constexpr = COLUMNS // 4 if COLUMNS < 128 else 32
    K_LANES: gl.constexpr = 32 // C_LANES
    K_WIDE: gl.constexpr = num_warps * K_LANES
    K_MOST: gl.constexpr = 4 if R > 4 else 8
    K_EACH: gl.constexpr = K_MOST if K_WIDE * K_MOST <= DP else DP // K_WIDE
    gl.static_assert(TENSOR or (K_EACH > 0 and DP % (K_WIDE * K_EACH) == 0), "more warps than the product has rows for")
    EACH: gl.constexpr = PARTS * LANES // 32 if PARTS * LANES > 32 else 1
    E_EACH: gl.constexpr = E_PARTS * E_LANES // 32 if E_PARTS * E_LANES > 32 else 1
    F_EACH: gl.constexpr = K_WIDE * E_LANES // 32 if K_WIDE * E_LANES > 32 else 1
    L_S: gl.constexpr = gl.BlockedLayout([EACH, 1, 4], [32 // LANES, 1, LANES], [1, R, WD], [2, 1, 0])
    L_E: gl.constexpr = gl.BlockedLayout([E_EACH, 1, 4], [32 // E_LANES, 1, E_LANES], [1, R, WD], [2, 1, 0])
    L_F: gl.constexpr = gl.BlockedLayout([F_EACH, 1, 4], [32 // E_LANES, 1, E_LANES], [1, R, WD], [2, 1, 0])
    F: gl.constexpr = gl.SliceLayout(0, L_F)
    L_T: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, num_warps], instr_shape=[16, 8])
    L_C: gl.constexpr = gl.BlockedLayout([1, 4], [K_LANES, C_LANES], [num_warps, 1], [1, 0])
    L_M: gl.constexpr = gl.DotOperandLayout(1, L_T, 2) if TENSOR else L_C
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
    k = gl.arange(0, DP, gl.SliceLayout(1, L_M))
    c = first_column + gl.arange(0, COLUMNS, gl.SliceLayout(0, L_M))
    QD: gl.constexpr = D if D == DP else 32
    row = k // QD * QD + k % (QD // 8) * 8 + k % QD // (QD // 8)
    p_map = output_map + h * D * D + row[:, None] * D + c[None, :]
    inside = (k < D)[:, None] & (c < D)[None, :]
    WHOLE: gl.constexpr = DP == D and D % COLUMNS == 0
    if TENSOR:
        if WHOLE:
            map = gl.load(p_map)
        else:
            map = gl.load(p_map, mask=inside, other=0.0)
        map_high = map.to(gl.bfloat16)
        map_low = (map - map_high.to(gl.float32)).to(gl.bfloat16)
    else:
        map_s = gl.allocate_shared_memory(gl.float32, [DP, COLUMNS], S2)
        if WHOLE:
            async_load(map_s, p_map)
        else:
            async_load(map_s, p_map, mask=inside)
        async_copy.commit_group()
    column_f = first_column + gl.arange(0, COLUMNS, gl.SliceLayout(0, F))
    shift = gl.load(value_shift + h * D + column_f, mask=column_f < D, other=0.0)
    last = batch * G - 1
    query = gl.minimum(first_query + gl.arange(0, R, gl.SliceLayout(0, gl.SliceLayout(2, L_S))), last)
    if HAS_SINK:
        if FEW:
            logit = h * group + gl.minimum(query % G // q_len, group - 1)
        else:
            logit = h * G + query % G
        sink = gl.load(sink_logits + logit).to(gl.float32) * LOG2E
    if PDL:
        launch_next()
        wait_for_previous()

    part = gl.arange(0, PARTS, gl.SliceLayout(1, gl.SliceLayout(2, L_S)))
    dims = gl.arange(0, DP, gl.SliceLayout(0, gl.SliceLayout(1, L_S)))
    of_split = ((query // G).to(gl.int64) * heads + h) * splits * G + query % G
    m_s, l_s, o_s = _merge(split_o, split_ml, of_split, splits, part, dims, G, D, DP, PARTS, MORE)
    query_e = gl.minimum(first_query + gl.arange(0, R, gl.SliceLayout(0, gl.SliceLayout(2, L_E))), last)
    part_e = gl.arange(0, E_PARTS, gl.SliceLayout(1, gl.SliceLayout(2, L_E)))
    column = first_column + gl.arange(0, COLUMNS, gl.SliceLayout(0, gl.SliceLayout(1, L_E)))
    of_exact = ((query_e // G).to(gl.int64) * heads + h) * chunks * G + query_e % G
    m_e, l_e, o_e = _merge(exact_o, exact_ml, of_exact, chunks, part_e, column, G, D, DP, E_PARTS, E_MORE)
    top = gl.max(m_s, axis=0)
    top = gl.maximum(top, gl.convert_layout(gl.max(m_e, axis=0), top.type.layout))
    if HAS_SINK:
        top = gl.maximum(top, sink)
    mass, x = _sum_parts(m_s, l_s, o_s, top)
    mass_e, y = _sum_parts(m_e, l_e, o_e, gl.convert_layout(top, gl.SliceLayout(0, m_e.type.layout)))
    total = mass + gl.convert_layout(mass_e, mass.type.layout)
    if HAS_SINK:
        total += gl.exp2(sink - top)
    inverse = gl.where(total == 0.0, 0.0, 1.0 / total)  # NaN stays

    if TENSOR:
        x_high = x.to(gl.bfloat16)
        x_low = (x - x_high.to(gl.float32)).to(gl.bfloat16)
        x_s = gl.allocate_shared_memory(gl.bfloat16, [2 * R, DP], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
        x_s.slice(0, R).store(x_high)
        x_s.slice(R, R).store(x_low)
        barrier()
        parts = x_s.load(gl.DotOperandLayout(0, L_T, 2))
        both = mma_v2(parts, map_low, gl.zeros([2 * R, COLUMNS], gl.float32, L_T))
        both = gl.reshape(mma_v2(parts, map_high, both), [2, R, COLUMNS])
        high, low = gl.split(gl.permute(both, (1, 2, 0)))
        unrotated = gl.convert_layout(high + low, F)
    else:
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

    query_f = first_query + gl.arange(0, R, gl.SliceLayout(1, F))
    mass_f = gl.convert_layout(mass, gl.SliceLayout(1, F))
    inverse_f = gl.convert_layout(inverse, gl.SliceLayout(1, F))
    y = gl.convert_layout(y, F) + unrotated + mass_f[:, None] * shift[None, :]
    row_f = query_f % G
    live_f = query_f <= last
    if FEW:
        live_f = live_f & (row_f < group * q_len)
        row_f += ((query_f // G).to(gl.int64) * heads + h) * (group * q_len)
    else:
        row_f += ((query_f // G).to(gl.int64) * heads + h) * G
    at = row_f[:, None] * D + column_f[None, :]
    live_f = live_f[:, None] & (column_f < D)[None, :]
    gl.store(out + at, (y * inverse_f[:, None]).to(out.dtype.element_ty), mask=live_f)
