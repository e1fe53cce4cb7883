"""The exact tokens of a decode step, sinks and window, on the tensor cores (Gluon): see decode_gluon.py."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from .gluon_basics import async_load, barrier, halves, softcapped


@gluon.constexpr_function
def _output_layout(dims):
    """[dims, 8 heads] in one warp: lane 4 g + t, dims / 8 consecutive dimensions of heads 2 t and 2 t + 1."""
    wide = dims // 8
    reg = [[1 << i, 0] for i in range(wide.bit_length() - 1)] + [[0, 1]]
    return gl.DistributedLinearLayout(reg, [[0, 2], [0, 4], [wide, 0], [2 * wide, 0], [4 * wide, 0]], [], [], [dims, 8])


@gluon.constexpr_function
def _exact_shared(dims):
    """Shared memory of tokens x dims, 16 bit: 8 tokens are in different banks."""
    return gl.SwizzledSharedLayout(8, max(1, 64 // dims), min(8, dims // 8), [1, 0])


@gluon.jit
def _copy_exact(
    keys, values, k_sinks, v_sinks, k_recent, v_recent, at_s, at_r, begin, n_sinks, count, base, capacity,
    D: gl.constexpr, QD: gl.constexpr, T: gl.constexpr,
):  # fmt: skip
    """Start copying T exact tokens from `begin` (the last one again beyond `count`) to shared memory, all at once."""
    # Whole cache lines, and of those as few to a lane's row as can be: a lane has 8 addresses, not 16.
    LANES: gl.constexpr = 8 if QD >= 64 else QD // 8
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [1, 1], [1, 0])
    index = gl.minimum(begin + gl.arange(0, T, gl.SliceLayout(1, COPY)), count - 1)
    dim = gl.arange(0, QD, gl.SliceLayout(0, COPY))
    slot = base + index - n_sinks
    slot = gl.where(slot >= capacity, slot - capacity, slot)
    is_sink = index < n_sinks
    # Triton 3.9 loses the alignment at the selection.
    p_k = gl.multiple_of(gl.where(is_sink, k_sinks + at_s + index * D, k_recent + at_r + slot * D), 16)
    p_v = gl.multiple_of(gl.where(is_sink, v_sinks + at_s + index * D, v_recent + at_r + slot * D), 16)
    for c in gl.static_range(D // QD):
        async_load(keys[c], p_k[:, None] + (c * QD + dim)[None, :])
        async_load(values[c], p_v[:, None] + (c * QD + dim)[None, :])
    async_copy.commit_group()


@gluon.jit
def attend_exact(
    q, k_sinks, v_sinks, k_recent, v_recent, stride_qh, stride_qn, at_s, at_r, first_head, chunk, n_sinks, count,
    packed, capacity, chunk_tokens, group, q_len, factor, cap,
    G: gl.constexpr, D: gl.constexpr, QD: gl.constexpr, T: gl.constexpr, SOFTCAP: gl.constexpr,
    FEW: gl.constexpr, S_L: gl.constexpr,
):  # fmt: skip
    """Online softmax of 8 query heads over chunk_tokens of the `count` exact tokens, T at a time: maximum, sum, and
    output for each QD dimensions; -1e30, 0 and 0 of no tokens.

    Queries and probabilities enter the 16-bit products as high + low part: 16 bits or more.
    """
    WIDE: gl.constexpr = 8 if QD >= 64 else QD // 8  # consecutive elements of a key or query in a lane
    QA: gl.constexpr = gl.DotOperandLayout(0, S_L, WIDE)
    KB: gl.constexpr = gl.DotOperandLayout(1, S_L, WIDE)
    VA: gl.constexpr = gl.DotOperandLayout(0, S_L, 2)
    PB: gl.constexpr = gl.DotOperandLayout(1, S_L, 2)
    PARTS: gl.constexpr = D // QD
    dtype: gl.constexpr = k_recent.dtype.element_ty
    begin = chunk * chunk_tokens
    end = gl.minimum(count, begin + chunk_tokens)
    base = packed % gl.maximum(capacity, 1)  # the ring slot of the first recent token
    keys = ()
    values = ()
    for _ in gl.static_range(PARTS):
        keys += (gl.allocate_shared_memory(dtype, [T, QD], _exact_shared(QD)),)
        values += (gl.allocate_shared_memory(dtype, [T, QD], _exact_shared(QD)),)
    if begin < end:
        _copy_exact(
            keys, values, k_sinks, v_sinks, k_recent, v_recent, at_s, at_r, begin, n_sinks, count, base, capacity,
            D, QD, T,
        )  # fmt: skip

    row = gl.arange(0, 16, gl.SliceLayout(1, QA))
    col = gl.arange(0, QD, gl.SliceLayout(0, QA))
    if FEW:
        index = gl.minimum(first_head + row % 8, group * q_len - 1)
        q += index[:, None] // q_len * stride_qh + index[:, None] % q_len * stride_qn
    else:
        q += gl.minimum(first_head + row % 8, G - 1)[:, None] * stride_qh
    x = ()
    acc = ()
    for c in gl.static_range(PARTS):
        full = gl.load(q + (c * QD + col)[None, :]).to(gl.float32)
        x_high = full.to(dtype)
        x_low = (full - x_high.to(gl.float32)).to(dtype)
        x = x + (gl.where((row < 8)[:, None], x_high, x_low),)
        acc = acc + (gl.zeros([QD, 8], gl.float32, S_L),)
    hi0, _ = halves(gl.zeros([16, T], gl.float32, S_L))
    SL: gl.constexpr = hi0.type.layout
    token = gl.arange(0, T, gl.SliceLayout(0, SL))
    m = gl.full([8], -1e30, gl.float32, gl.SliceLayout(1, SL))
    l = gl.full([8], 0.0, gl.float32, gl.SliceLayout(1, SL))
    for first in range(begin, end, T):
        async_copy.wait_group(0)
        barrier()
        total = gl.zeros([16, T], gl.float32, S_L)
        for c in gl.static_range(PARTS):
            total = mma_v2(x[c], keys[c].permute((1, 0)).load(KB), total)
        s_high, s_low = halves(total)
        s = (s_high + s_low) * factor
        if SOFTCAP:
            s = softcapped(s, cap)
        s = gl.where((first + token < end)[None, :], s, float("-inf"))
        top = gl.maximum(m, gl.max(s, axis=1))
        alpha = gl.exp2(m - top)
        p = gl.exp2(s - top[:, None])
        l = l * alpha + gl.sum(p, axis=1)
        m = top
        p_high = p.to(dtype)
        p_low = (p - p_high.to(gl.float32)).to(dtype)
        p_high = gl.convert_layout(gl.permute(p_high, (1, 0)), PB, assert_trivial=True)
        p_low = gl.convert_layout(gl.permute(p_low, (1, 0)), PB, assert_trivial=True)
        column_alpha = gl.convert_layout(alpha, gl.SliceLayout(0, S_L))
        fresh = ()
        for c in gl.static_range(PARTS):
            v = values[c].permute((1, 0)).load(VA)
            o = mma_v2(v, p_high, acc[c] * column_alpha[None, :])
            fresh = fresh + (mma_v2(v, p_low, o),)
        acc = fresh
        if first + T < end:
            barrier()
            _copy_exact(
                keys, values, k_sinks, v_sinks, k_recent, v_recent, at_s, at_r, first + T, n_sinks, count, base,
                capacity, D, QD, T,
            )  # fmt: skip
    return m, l, acc


@gluon.jit
def store_part(
    p_o, p_ml, m, l, acc, at_part, first_head,
    G: gl.constexpr, D: gl.constexpr, QD: gl.constexpr, EXACT: gl.constexpr, S_L: gl.constexpr,
):  # fmt: skip
    """Store the result of 8 heads: entry at_part + head of p_o [.., D] and of p_ml [.., 2].

    Of each QD dimensions row 8 a + g is stored at QD / 8 g + a, where a lane has consecutive ones; exact outputs, which
    are merged as they are, are exchanged between lanes and stored in order.  (m, l, o) and
    (m + e, l / 2 ** e, o / 2 ** e) mean the same: e brings l below 1, and so o below the largest value, for 16 bits.
    """
    e = gl.maximum((l.to(gl.int32, bitcast=True) >> 23) - 126, 0)
    unit = ((127 - e) << 23).to(gl.float32, bitcast=True)
    m += e.to(gl.float32)
    l *= unit
    unit = gl.convert_layout(unit, gl.SliceLayout(0, S_L))
    head = first_head + gl.arange(0, 8, m.type.layout)
    for c in gl.static_range(D // QD):
        o = (acc[c] * unit[None, :]).to(p_o.dtype.element_ty)
        if not EXACT:
            o = gl.reshape(gl.permute(gl.reshape(o, [QD // 8, 8, 8]), (1, 0, 2)), [QD, 8])
        o = gl.convert_layout(o, _output_layout(QD), assert_trivial=not EXACT)
        dim = gl.arange(0, QD, gl.SliceLayout(1, o.type.layout))
        column = first_head + gl.arange(0, 8, gl.SliceLayout(0, o.type.layout))
        to = p_o + at_part * D + column[None, :] * D + (c * QD + dim)[:, None]
        gl.store(to, o, mask=(column < G)[None, :])
    gl.store(p_ml + 2 * (at_part + head), m, mask=head < G)
    gl.store(p_ml + 2 * (at_part + head) + 1, l, mask=head < G)
