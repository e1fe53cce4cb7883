"""The exact tokens of a decode step, sinks and window, on the tensor cores (Gluon): see decode_gluon.py."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .gluon_basics import halves, softcapped


@gluon.constexpr_function
def _exact_value_layout(wide):
    """[8 g, wide a, 32 tokens] in one warp: lane 4 g + t, tokens 2 t and 2 t + 1 in every 8, all of a."""
    reg = [[0, 1 << i, 0] for i in range(wide.bit_length() - 1)] + [[0, 0, 1], [0, 0, 8], [0, 0, 16]]
    lane = [[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(reg, lane, [], [], [8, wide, 32])


@gluon.constexpr_function
def _output_layout(dims):
    """[dims, 8 heads] in one warp: lane 4 g + t, dims / 8 consecutive dimensions of heads 2 t and 2 t + 1."""
    wide = dims // 8
    reg = [[1 << i, 0] for i in range(wide.bit_length() - 1)] + [[0, 1]]
    return gl.DistributedLinearLayout(reg, [[0, 2], [0, 4], [wide, 0], [2 * wide, 0], [4 * wide, 0]], [], [], [dims, 8])


@gluon.jit
def attend_exact(
    q, k_sinks, v_sinks, k_recent, v_recent, stride_qh, at_s, at_r, first_head, chunk, n, packed, sinks, capacity,
    chunk_tokens, factor, cap,
    G: gl.constexpr, D: gl.constexpr, QD: gl.constexpr, SOFTCAP: gl.constexpr, S_L: gl.constexpr,
):  # fmt: skip
    """Online softmax of 8 query heads over chunk_tokens exact tokens: maximum, sum, output for each QD dimensions,
    and whether there were any.

    Queries and probabilities enter the 16-bit products as high + low part: 16 bits or more.
    """
    # A lane reads QD / 8 consecutive elements of a key or value; the products' order of dimensions follows from that.
    WIDE: gl.constexpr = QD // 8
    QA: gl.constexpr = gl.DotOperandLayout(0, S_L, WIDE)
    KB: gl.constexpr = gl.DotOperandLayout(1, S_L, WIDE)
    VA: gl.constexpr = gl.DotOperandLayout(0, S_L, 2)
    PB: gl.constexpr = gl.DotOperandLayout(1, S_L, 2)
    V_L: gl.constexpr = _exact_value_layout(WIDE)
    PARTS: gl.constexpr = D // QD
    dtype: gl.constexpr = k_recent.dtype.element_ty
    row = gl.arange(0, 16, gl.SliceLayout(1, QA))
    col = gl.arange(0, QD, gl.SliceLayout(0, QA))
    k_dim = gl.arange(0, QD, gl.SliceLayout(1, KB))
    k_token = gl.arange(0, 32, gl.SliceLayout(0, KB))
    # [8, WIDE, 32]: dimension WIDE g + a is row 8 a + g of V^T
    v_dim = gl.arange(0, 8, gl.SliceLayout(1, gl.SliceLayout(2, V_L)))[:, None, None] * WIDE
    v_dim += gl.arange(0, WIDE, gl.SliceLayout(0, gl.SliceLayout(2, V_L)))[None, :, None]
    v_token = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, V_L)))
    hi0, _ = halves(gl.zeros([16, 32], gl.float32, S_L))
    SL: gl.constexpr = hi0.type.layout
    token = gl.arange(0, 32, gl.SliceLayout(0, SL))
    in_sinks = gl.minimum(n, sinks)
    count = in_sinks + gl.where(capacity == 0, 0, gl.maximum(n - sinks, 0) - packed)
    slots = gl.maximum(capacity, 1)

    x = ()
    acc = ()
    for c in gl.static_range(PARTS):
        head = gl.minimum(first_head + row % 8, G - 1)
        full = gl.load(q + head[:, None] * stride_qh + (c * QD + col)[None, :]).to(gl.float32)
        x_high = full.to(dtype)
        x_low = (full - x_high.to(gl.float32)).to(dtype)
        x = x + (gl.where((row < 8)[:, None], x_high, x_low),)
        acc = acc + (gl.zeros([QD, 8], gl.float32, S_L),)
    m = gl.full([8], -1e30, gl.float32, gl.SliceLayout(1, SL))
    l = gl.full([8], 0.0, gl.float32, gl.SliceLayout(1, SL))
    for begin in range(chunk * chunk_tokens, gl.minimum(count, (chunk + 1) * chunk_tokens), 32):
        k_index = begin + k_token
        k_live = (k_index < count)[None, :]
        p_k = k_recent + at_r + (packed + k_index - in_sinks) % slots * D
        p_k = gl.where(k_index < in_sinks, k_sinks + at_s + k_index * D, p_k)
        v_index = begin + v_token
        v_live = (v_index < count)[None, None, :]
        p_v = v_recent + at_r + (packed + v_index - in_sinks) % slots * D
        # Triton 3.9 loses the alignment at the selection; the same hint on keys makes its loop spill.
        p_v = gl.multiple_of(gl.where(v_index < in_sinks, v_sinks + at_s + v_index * D, p_v), 16)
        total = gl.zeros([16, 32], gl.float32, S_L)
        for c in gl.static_range(PARTS):
            k = gl.load(p_k[None, :] + (c * QD + k_dim)[:, None], mask=k_live, other=0.0)
            total = mma_v2(x[c], k, total)
        s_high, s_low = halves(total)
        s = (s_high + s_low) * factor
        if SOFTCAP:
            s = softcapped(s, cap)
        s = gl.where((begin + token < count)[None, :], s, float("-inf"))
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
            v = gl.load(p_v[None, None, :] + (c * QD + v_dim), mask=v_live, other=0.0)
            v = gl.convert_layout(gl.reshape(gl.permute(v, (1, 0, 2)), [QD, 32]), VA)
            o = mma_v2(v, p_high, acc[c] * column_alpha[None, :])
            fresh = fresh + (mma_v2(v, p_low, o),)
        acc = fresh
    return m, l, acc, chunk * chunk_tokens < count


@gluon.jit
def store_part(
    p_o, p_ml, m, l, acc, live, at_part, rows, first_head,
    G: gl.constexpr, D: gl.constexpr, QD: gl.constexpr, S_L: gl.constexpr,
):  # fmt: skip
    """Store the result of 8 heads: entry at_part + head of p_o [.., D] (if live) and of p_ml [2, rows].

    Of each QD dimensions row 8 a + g is stored at QD / 8 g + a: there a lane has consecutive ones.  (m, l, o) and
    (m + e, l / 2 ** e, o / 2 ** e) mean the same: e brings l below 1, and so o below the largest value, for 16 bits.
    """
    e = gl.maximum((l.to(gl.int32, bitcast=True) >> 23) - 126, 0)
    unit = ((127 - e) << 23).to(gl.float32, bitcast=True)
    m += e.to(gl.float32)
    l *= unit
    unit = gl.convert_layout(unit, gl.SliceLayout(0, S_L))
    head = first_head + gl.arange(0, 8, m.type.layout)
    if live:
        for c in gl.static_range(D // QD):
            o = (acc[c] * unit[None, :]).to(p_o.dtype.element_ty)
            o = gl.reshape(gl.permute(gl.reshape(o, [QD // 8, 8, 8]), (1, 0, 2)), [QD, 8])
            o = gl.convert_layout(o, _output_layout(QD), assert_trivial=True)
            dim = gl.arange(0, QD, gl.SliceLayout(1, o.type.layout))
            column = first_head + gl.arange(0, 8, gl.SliceLayout(0, o.type.layout))
            to = p_o + at_part * D + column[None, :] * D + (c * QD + dim)[:, None]
            gl.store(to, o, mask=(column < G)[None, :])
    gl.store(p_ml + at_part + head, m, mask=head < G)
    gl.store(p_ml + rows + at_part + head, l, mask=head < G)
